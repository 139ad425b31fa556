"""The ImageNet recipe: classification training of towers and of any timm model.

arguments.py    the command line, under timm's names
data.py         image folders, parquet, shards → training and evaluation loaders
model.py        a tower with a classifier, pretrained or not, frozen or not
launch.py       processes and precision (accelerate), the optimizer (timm)
step.py         one optimizer step
evaluate.py     top-1, top-5, tokens
checkpoint.py   checkpoints, whole or absent
record.py       what a run is, and whether a resumed one is the same
train.py        train(args): what scripts/train_imagenet.py calls
range_test.py   the learning-rate range test's arithmetic and drawing
"""
