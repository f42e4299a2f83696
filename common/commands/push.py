"""`make push`: uploads what a run learnt to the Hugging Face hub, after it has said what and where and has asked."""

import argparse
import sys

from common.machine.disk import format_bytes
from common.recipe import Recipe, UserError, require


def add_push_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repo", help="where to: owner/name on the hub")
    parser.add_argument("--public", action="store_true", help="for everybody to read (default: private)")
    parser.add_argument("--yes", action="store_true", help="upload without asking")


def run_push(recipe: Recipe, flags: argparse.Namespace) -> None:
    """Uploads adapter, tokenizer and model card, and nothing else.

    Raises UserError when nobody agreed, when the repository is public and --public was not given, and as find_adapter,
    files_to_share and HubModel.
    """
    require(bool(flags.repo), "name the place on the hub: make push REPO=owner/name, where the owner is you")
    print(f"reading the adapter in {recipe.out}", flush=True)
    from common.adapter.find import find_adapter
    from common.adapter.sharing import files_to_share
    from common.machine.hub_upload import HubModel

    adapter, place = find_adapter(recipe), HubModel(flags.repo)
    files = files_to_share(adapter, flags.repo)
    found = place.look()
    if found.exists and not found.private and not flags.public:
        raise UserError(
            f"{place.page} exists and is public: everybody would read what you upload. If you want that: "
            "ARGS=--public; if not, name another: REPO=..."
        )
    print(f"to upload, {_size_in_words(sum(file.size for file in files))}:")
    for file in files:
        print(f"  {file.name:28} {_size_in_words(file.size)}")
    if not found.exists:
        print(f"to {place.page}, a new repository, {'public' if flags.public else 'private'}")
    else:
        print(f"to {place.page}, which exists and is {'private' if found.private else 'public'}")
        if flags.public and found.private:
            print("  it stays private: what everybody may read is set on its page, under Settings")
        names = {file.name for file in files}
        if replaced := sorted(found.files & names):
            print(f"  it has {', '.join(replaced)}, replaced there (earlier versions stay in its history)")
        if others := sorted(found.files - names - {".gitattributes"}):
            more = f" and {len(others) - 5} more" if len(others) > 5 else ""
            print(f"  it holds something else as well, which stays: {', '.join(others[:5])}{more}")
    if not flags.yes and not _agrees():
        print("nothing was uploaded")
        return
    if not found.exists:
        place.create(private=not flags.public)
    commit = place.upload(files, "LoRA adapter")
    done = "nothing has changed since the last time" if commit == found.commit else "uploaded"
    print(f"{done}: {place.page}")


def _size_in_words(size: int) -> str:
    return format_bytes(size) if size >= 2**20 else f"{max(1, round(size / 2**10))} KiB"


def _agrees() -> bool:
    if not sys.stdin.isatty():
        raise UserError(
            "nothing was uploaded: there is no terminal to ask on. To upload without a question: ARGS=--yes"
        )
    try:
        return input("upload? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False
