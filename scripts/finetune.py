"""Stage 2, instruction tuning: train projector and language model on conversations, the tower frozen.

    deepspeed scripts/finetune.py scripts/recipes/finetune_158k.yaml \\
        --model_name_or_path STAGE_1_OUTPUT --data_path llava_instruct_150k.json --image_folder images --output_dir OUT

Plain `python` and `torchrun` work as well. Add `--resume_from_checkpoint latest` to continue a run that was stopped.
"""

from llava_drip import cli
from llava_drip.instruct.stage import run_stage

if __name__ == "__main__":
    cli.run(lambda: run_stage("finetune"), "finetune.py")
