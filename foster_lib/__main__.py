"""`python -m foster_lib`: see `foster_lib.cli`."""

import os


def main() -> None:
    """Run the command line; nothing looks at the network unless HF_HUB_OFFLINE=0 is set."""
    # Before transformers is imported: even for a local folder it may ask the hub otherwise.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from foster_lib.cli import app

    app()


if __name__ == "__main__":
    main()
