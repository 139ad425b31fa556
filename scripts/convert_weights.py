"""A language model with weights in pytorch_model*.bin, as Vicuna's are, → a directory with safetensors.

    python scripts/convert_weights.py lmsys/vicuna-7b-v1.5 --output vicuna-7b-v1.5

The source is a directory, or a repository of the Hugging Face Hub (NAME or NAME@REVISION).
"""

from llava_drip import cli


def main() -> None:
    parser = cli.ArgumentParser(prog="convert_weights.py", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory, or ORGANISATION/NAME[@REVISION] of the Hub")
    parser.add_argument("--output", required=True, help="directory to write; it must not exist")
    args = parser.parse_args()
    from llava_drip.assistant.bin_weights import convert_weights  # late: it brings torch with it

    print("wrote", convert_weights(args.model, args.output))


if __name__ == "__main__":
    cli.run(main, "convert_weights.py")
