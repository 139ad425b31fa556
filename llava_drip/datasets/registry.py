"""What each name of scripts/download_data.py stands for. Places are below --dir, in the layout that LLaVA's recipes use.

Sizes are bytes, where `exact`; else those of a page, rounded. A fact stands beside the address of its page (November 2026). The
files themselves could not be fetched and counted when this was written.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

KB, MB, GB = 10**3, 10**6, 10**9


@dataclass(frozen=True)
class Unpacked:
    """What becomes of a zip. folder: where it is unpacked. pictures: the folder that then holds `count` pictures, in all depths.

    count: None where no number is published.
    """

    folder: str
    pictures: str
    count: int | None = None


@dataclass(frozen=True)
class Source:
    """One file.

    place: below --dir. url: its address; of a file on the Hugging Face Hub: hub://OWNER/NAME/PATH (a data set, branch main).
    size: bytes. exact: size is the exact number. md5: where published; the Hub states a checksum (SHA-256) by itself.
    rows: objects of a JSON list, members of a JSON object, or lines of a .jsonl. unzip: of a zip.
    each: `url` holds {image}, and is fetched for each picture that this .jsonl below --dir names; `place` is their folder.
    """

    place: str
    url: str
    size: int
    exact: bool = False
    md5: str | None = None
    rows: int | None = None
    unzip: Unpacked | None = None
    each: str | None = None


@dataclass(frozen=True)
class DataSet:
    """what: one line. licence: what its pages say. about: pages on that and the sizes. needs: other names it comes with."""

    name: str
    what: str
    licence: str
    about: tuple[str, ...]
    sources: tuple[Source, ...] = ()
    needs: tuple[str, ...] = ()


_COCO = "http://images.cocodataset.org"
_COCO_LICENCE = "annotations CC BY 4.0; the photos belong to their Flickr authors: Flickr's terms of use"
_COCO_ABOUT = ("https://cocodataset.org/#download", "https://cocodataset.org/#termsofuse")
_LLAVA_RAW = "https://raw.githubusercontent.com/haotian-liu/LLaVA/main"
_SQA_RAW = "https://raw.githubusercontent.com/lupantech/ScienceQA/main/data/scienceqa"
_SQA_S3 = "https://scienceqa.s3.us-west-1.amazonaws.com/images"
_INSTRUCT = "hub://liuhaotian/LLaVA-Instruct-150K"
_WILD = "hub://liuhaotian/llava-bench-in-the-wild"
_INSTRUCT_LICENCE = "CC BY 4.0, and OpenAI's terms of use (answers by GPT-4); each picture's own terms besides"


def _coco(split: str, size: int, md5: str, count: int) -> DataSet:
    zip_file = Source(
        f"coco/{split}.zip",
        f"{_COCO}/zips/{split}.zip",
        size,
        True,
        md5,
        unzip=Unpacked("coco", f"coco/{split}", count),
    )
    # Sizes and MD5: pages of projects that check them, such as NVIDIA's DeepLearningExamples and salesforce/LAVIS (MD5).
    return DataSet(f"coco-{split}", f"COCO {split}: {count:,} photos", _COCO_LICENCE, _COCO_ABOUT, (zip_file,))


_ALL = (
    DataSet(
        "llava-pretrain",
        "LLaVA-Pretrain 558K: captions by BLIP over pictures of LAION, CC and SBU, for stage 1",
        "its card says: must comply with the licences of CC-3M and BLIP; the pictures have their owners' terms",
        ("https://huggingface.co/datasets/liuhaotian/LLaVA-Pretrain",),
        (
            Source(
                "LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
                "hub://liuhaotian/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json",
                181 * MB,
                rows=558_128,
            ),
            Source(
                "LLaVA-Pretrain/images.zip",
                "hub://liuhaotian/LLaVA-Pretrain/images.zip",
                27_400 * MB,
                unzip=Unpacked("LLaVA-Pretrain/images", "LLaVA-Pretrain/images", 558_128),
            ),
        ),
    ),
    DataSet(
        "llava-instruct-158k",
        "LLaVA-Instruct-158K: conversations, descriptions and reasoning by GPT-4 over COCO train2017, for stage 2",
        _INSTRUCT_LICENCE,
        (
            "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
            "https://github.com/haotian-liu/LLaVA/issues/702 (157,712 rows)",
        ),
        (Source("llava_instruct_150k.json", f"{_INSTRUCT}/llava_instruct_150k.json", 229 * MB, rows=157_712),),
        ("coco-train2017",),
    ),
    DataSet(
        "llava-mix-665k",
        "LLaVA-1.5's mix of 665K conversations over five sets of pictures, for stage 2",
        _INSTRUCT_LICENCE,
        (
            "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K",
            "https://github.com/haotian-liu/LLaVA/issues/702 (rows of each part, 665,298 in all)",
            "https://github.com/haotian-liu/LLaVA#visual-instruction-tuning (where the pictures lie)",
        ),
        (Source("llava_v1_5_mix665k.json", f"{_INSTRUCT}/llava_v1_5_mix665k.json", 1_030 * MB, rows=665_298),),
        ("coco-train2017", "gqa", "ocr-vqa", "textvqa", "visual-genome"),
    ),
    _coco("train2017", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2", 118_287),
    _coco("val2017", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80", 5_000),
    _coco("train2014", 13_510_573_713, "0da8c0bd3d6becc4dcb32757491aca88", 82_783),
    _coco("val2014", 6_645_013_297, "a3d79f5ed8d289b7a7554ce06a5782b3", 40_504),
    DataSet(
        "coco-annotations",
        "COCO's annotations of 2014 and 2017, captions among them (captions_train2017.json, ...)",
        _COCO_LICENCE,
        _COCO_ABOUT,
        (
            Source(
                "coco/annotations_trainval2014.zip",
                f"{_COCO}/annotations/annotations_trainval2014.zip",
                252_872_794,
                True,
                "0a379cfc70b0e71301e0f377548639bd",
                unzip=Unpacked("coco", "coco/annotations"),
            ),
            Source(
                "coco/annotations_trainval2017.zip",
                f"{_COCO}/annotations/annotations_trainval2017.zip",
                252_907_541,
                True,
                "f4bbac642086de4f52a3fdda2de5fa2c",
                unzip=Unpacked("coco", "coco/annotations"),
            ),
        ),
    ),
    DataSet(
        "gqa",
        "GQA's pictures (Visual Genome's and others)",
        "CC BY 4.0 (GQA, Visual Genome); the photos belong to their Flickr authors",
        (
            "https://cs.stanford.edu/people/dorarad/gqa/download.html",
            "https://github.com/haotian-liu/LLaVA/issues/702 (148,854 pictures)",
        ),
        (
            Source(
                "gqa/images.zip",
                "https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip",
                21_817_965_542,
                True,
                unzip=Unpacked("gqa", "gqa/images", 148_854),
            ),
        ),
    ),
    DataSet(
        "ocr-vqa",
        "OCR-VQA's book covers, of LLaVA-1.5's mix (a copy on the Hub: most of the original addresses are dead)",
        "no licence is stated; the covers belong to their publishers: research only",
        (
            "https://huggingface.co/datasets/weizhiwang/llava_v15_instruction_images",
            "https://github.com/haotian-liu/LLaVA/pull/1458",
        ),
        (
            Source(
                "ocr_vqa/images.zip",
                "hub://weizhiwang/llava_v15_instruction_images/ocr_vqa_images_llava_v15.zip",
                8_971_611_056,
                True,
                unzip=Unpacked("ocr_vqa", "ocr_vqa/images"),
            ),
        ),
    ),
    DataSet(
        "textvqa",
        "TextVQA's pictures of train and val (Open Images)",
        "CC BY 4.0 (TextVQA); each photo of Open Images has its own",
        ("https://textvqa.org/dataset/", "https://github.com/haotian-liu/LLaVA/issues/702 (25,119 pictures)"),
        (
            Source(
                "textvqa/train_val_images.zip",
                "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
                7_072_297_970,
                True,
                unzip=Unpacked("textvqa", "textvqa/train_images", 25_119),
            ),
        ),
    ),
    DataSet(
        "visual-genome",
        "Visual Genome's pictures, in two parts",
        "CC BY 4.0 (Visual Genome); the photos belong to their Flickr authors",
        (
            "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html",
            "https://github.com/haotian-liu/LLaVA/issues/702 (64,346 and 43,903 pictures)",
        ),
        (
            Source(
                "vg/images.zip",
                "https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip",
                9_731_705_982,
                True,
                unzip=Unpacked("vg", "vg/VG_100K", 64_346),
            ),
            Source(
                "vg/images2.zip",
                "https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip",
                5_471_658_058,
                True,
                unzip=Unpacked("vg", "vg/VG_100K_2", 43_903),
            ),
        ),
    ),
    DataSet(
        "scienceqa",
        "ScienceQA: 21,208 problems of school science, 10,332 of them with a picture",
        "CC BY-NC-SA 4.0 (LICENSE-DATA of lupantech/ScienceQA)",
        (
            "https://github.com/lupantech/ScienceQA (tools/download.sh)",
            "https://arxiv.org/abs/2209.09513 (numbers of problems and of those with a picture)",
            "https://huggingface.co/datasets/derek-thomas/ScienceQA (the sizes are its parquet files')",
        ),
        (
            Source("scienceqa/problems.json", f"{_SQA_RAW}/problems.json", 30 * MB, rows=21_208),
            Source("scienceqa/pid_splits.json", f"{_SQA_RAW}/pid_splits.json", 220 * KB),
            *(
                Source(
                    f"scienceqa/images/{split}.zip",
                    f"{_SQA_S3}/{split}.zip",
                    megabytes * MB,
                    unzip=Unpacked(
                        "scienceqa/images", f"scienceqa/images/{split}", count
                    ),  # of questions; choices' besides
                )
                for split, megabytes, count in (("train", 377, 6_218), ("val", 126, 2_097), ("test", 122, 2_017))
            ),
        ),
    ),
    DataSet(
        "llava-bench-coco",
        "LLaVA-Bench (COCO): 30 photos, 90 questions, GPT-4's answers, and LLaVA's judge prompts",
        "Apache-2.0 (the LLaVA repository); OpenAI's terms for GPT-4's answers, Flickr's for the photos",
        ("https://github.com/haotian-liu/LLaVA (playground/data/coco2014_val_qa_eval, llava/eval/table)",),
        (
            *(
                Source(
                    f"llava_bench/coco/{name}",
                    f"{_LLAVA_RAW}/playground/data/coco2014_val_qa_eval/{name}",
                    size,
                    rows=90,
                )
                for name, size in (("qa90_questions.jsonl", 12 * KB), ("qa90_gpt4_answer.jsonl", 41 * KB))
            ),
            Source(
                "llava_bench/coco/caps_boxes_coco2014_val_80.jsonl",
                f"{_LLAVA_RAW}/llava/eval/table/caps_boxes_coco2014_val_80.jsonl",
                59 * KB,
                rows=80,
            ),
            Source("llava_bench/rule.json", f"{_LLAVA_RAW}/llava/eval/table/rule.json", 9 * KB),
            Source(
                "llava_bench/coco/images",
                f"{_COCO}/val2014/COCO_val2014_{{image}}",
                30 * 160 * KB,  # as the photos of val2014 are on average
                rows=30,
                each="llava_bench/coco/qa90_questions.jsonl",
            ),
        ),
    ),
    DataSet(
        "llava-bench-in-the-wild",
        "LLaVA-Bench (In-the-Wild): 24 pictures, 60 questions, contexts, GPT-4's answers",
        "Apache-2.0 (its card); the pictures come from the web, OpenAI's terms for GPT-4's answers",
        ("https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild",),
        (
            Source("llava_bench/in_the_wild/questions.jsonl", f"{_WILD}/questions.jsonl", 8 * KB, rows=60),
            Source("llava_bench/in_the_wild/context.jsonl", f"{_WILD}/context.jsonl", 8 * KB, rows=24),
            Source("llava_bench/in_the_wild/answers_gpt4.jsonl", f"{_WILD}/answers_gpt4.jsonl", 47 * KB, rows=60),
            Source("llava_bench/rule.json", f"{_LLAVA_RAW}/llava/eval/table/rule.json", 9 * KB),
            Source(
                "llava_bench/in_the_wild/images",
                f"{_WILD}/images/{{image}}",
                9_700 * KB,
                rows=24,
                each="llava_bench/in_the_wild/questions.jsonl",
            ),
        ),
    ),
)
DATASETS = {dataset.name: dataset for dataset in _ALL}


def chosen(names: list[str], with_pictures: bool = True) -> list[DataSet]:
    """Data sets by name, each followed by those it needs, none twice.

    with_pictures: False leaves out zips and folders of pictures, and so the data sets that are nothing else.
    Raises:
        ValueError: naming an unknown one, or one that has nothing but pictures when they are left out.
    """
    found: dict[str, DataSet] = {}
    for name in names:
        if name not in DATASETS:
            raise ValueError(f"no data set {name!r}; there are {', '.join(DATASETS)}")
        one = DATASETS[name]
        if not with_pictures:
            one = replace(one, sources=tuple(s for s in one.sources if not (s.unzip or s.each)), needs=())
            if not one.sources:
                raise ValueError(f"{name}: has nothing but pictures, which --no_pictures leaves out")
        for each in (one, *(DATASETS[other] for other in one.needs)):
            found.setdefault(each.name, each)
    return list(found.values())
