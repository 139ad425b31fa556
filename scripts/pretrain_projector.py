"""Stage 1, feature alignment: train the projector between a frozen tower and a frozen language model.

    deepspeed scripts/pretrain_projector.py scripts/recipes/pretrain_558k.yaml \\
        --model_name_or_path LANGUAGE_MODEL --vision_tower TOWER --data_path chat.json --image_folder images --output_dir OUT

Plain `python` and `torchrun` work as well. Add `--resume_from_checkpoint latest` to continue a run that was stopped.
"""

from llava_drip import cli
from llava_drip.instruct.stage import run_stage

if __name__ == "__main__":
    cli.run(lambda: run_stage("pretrain"), "pretrain_projector.py")
