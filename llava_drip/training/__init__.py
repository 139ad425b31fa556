"""What the programs that train towers share: data in a known order, randomness that can be repeated, and what is written down.

    pictures.py    where a picture of a set lies: a file, a member of a tar, a row of a parquet file
    caption_lists.py lists of pictures with captions
    units.py       shards (webdataset tars, parquet row groups) → raw samples
    skips.py       what was skipped, by cause, with examples, and what takes its place
    streams.py     units → batches, in an order that ranks share and a killed run finds again
    rows.py        the same for data with an index: image folders, tables of pairs
    loader.py      either of them as a DataLoader that knows how far it has come
    seeds.py       randomness as a function of (seed, step) and (seed, sample)
    class_names.py names of classes by label
    meters.py      tokens of an image, step time, peak memory
    records.py     JSON Lines of epochs and steps, cut back where a run resumes
    recipe.py      YAML recipes as flags
    range_test.py  learning-rate range tests: what the losses say

Two promises hold for all of it. The order of samples, and each one's augmentation, follow from the seed alone, however many
ranks share a global batch. And a run that goes on from a checkpoint sees what the uninterrupted one would have seen.
"""
