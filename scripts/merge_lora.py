"""Merge the result of a LoRA or QLoRA run into its base: a whole assistant that needs neither the base nor peft.

    python scripts/merge_lora.py LORA_OUTPUT --output MERGED

LORA_OUTPUT is the output directory of scripts/finetune.py --lora_enable true, or one of its checkpoints. It is done in fp32 on
the CPU; --dtype says how the weights are written. A QLoRA adapter is merged into the base as it is on disk, not into the 4-bit
weights that it was trained on: docs/guides/lora.md says what that changes.
"""

from llava_drip import cli


def main() -> None:
    parser = cli.ArgumentParser(prog="merge_lora.py", description=__doc__.splitlines()[0])
    parser.add_argument("adapter", help="result of a LoRA run, or one of its checkpoints")
    parser.add_argument("--output", required=True, help="directory for the whole assistant, new or empty")
    parser.add_argument("--base", help="where the base lies now, if it was moved")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights; the base's unless given"
    )
    flags = parser.parse_args()
    from llava_drip.instruct.merge import merge  # late: --help takes no time

    print(merge(flags.adapter, flags.output, flags.base, flags.dtype))


if __name__ == "__main__":
    cli.run(main, "merge_lora.py")
