"""The ImageNet recipe: classification training of towers and of any timm model; distillation of towers on the same loop.

arguments.py    the command line, under timm's names
checks.py       flags that are wrong, named
sources.py      what --train-data names, and its classes
data.py         image folders, parquet, shards → training and evaluation loaders
model.py        a tower with a classifier, pretrained or not, frozen or not
launch.py       processes and precision (accelerate), optimizer and schedule (timm)
sharding.py     FSDP
run.py          all of these together: a run, new or resumed
step.py         one optimizer step
teacher.py      a teacher beside the labels, and its losses
evaluate.py     top-1, top-5, tokens
epoch.py        what an epoch leaves: its record and line, towers
checkpoint.py   checkpoints, whole or absent
record.py       what a run is, and whether a resumed one is the same
train.py        train(args): what scripts/train_imagenet.py calls
lr_finder.py    range_test(args): what scripts/lr_finder.py calls
distillation.py  student and teacher, and the losses between them
distill.py      distill(args): what scripts/distill_tower.py calls
distill_arguments.py  its command line
compare.py      towers trained by one protocol: what scripts/compare_towers.py runs
compare_recipe.py  its recipe: protocol and variants
in_memory.py    small data sets decoded once, augmented as whole batches
"""
