"""Files from the network, whole and checked, or refused.

    hub_file   a file of Hugging Face's hub, through huggingface_hub: its cache (HF_HOME), its mirrors
               (HF_ENDPOINT), its proxies; a line that breaks is taken up again
    download   any other address, through torch.hub

Notable: huggingface_hub compares sizes. What it keeps a large file under is the sha256 that the hub states,
so here the content is compared with it, too. Where a sha256 is pinned, that one counts.
"""

import http.client
import os

from storage.files import UserError, sha256


def hub_file(repository, name, pinned=None, **options):
    """The path of a file of a repository on the hub, which is fetched unless it is in the cache.

    pinned: its sha256, where known. options: of `hf_hub_download`, such as repo_type. Raises UserError.
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as error:
        raise UserError(f"{name} of {repository} is fetched through a package that is not installed: "
                        "pip install huggingface_hub") from error
    try:
        path = hf_hub_download(repository, name, **options)
    except Exception as error:  # of many types, by three packages
        raise UserError(f"{name} of {repository} cannot be fetched ({type(error).__name__}: "
                        f"{str(error).partition(chr(10))[0]}). It is kept in the folder that the environment "
                        "variable HF_HOME names: without network copy that folder from a machine that has it"
                        ) from error
    blob = os.path.realpath(path)
    stated = pinned or os.path.basename(blob)
    if len(stated) == 64 and sha256(blob) != stated:  # git's names of small files are shorter
        os.remove(blob)
        raise UserError(f"{path} is not the file that it should be (wrong sha256); it is deleted. Type the "
                        "same command again")
    return path


def download(url, path, pinned=None):
    """Bring url to path, unless it is there already. Returns path.

    pinned: its sha256, where known. Raises UserError, and then there is nothing at path.
    """
    if not os.path.exists(path):
        from torch.hub import download_url_to_file  # here: who makes data offline needs no torch

        os.makedirs(os.path.dirname(path), exist_ok=True)
        print(f"downloading {url}", flush=True)
        try:
            download_url_to_file(url, path, pinned)
        except (OSError, RuntimeError, http.client.HTTPException) as error:
            raise UserError(f"{url}: {error}. Type the same command again; without network here, bring the "
                            f"file to {path} by hand") from error
    return path
