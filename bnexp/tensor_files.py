"""Reading what `torch.save` wrote, or what someone wants to be taken for it."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from bnexp.atomic import open_ordinary


def load_tensors(path: Path, strict: bool = True) -> Any:
    """The content of the file at `path`, its tensors on the CPU; nothing in it is executed.

    Such a file is a zip archive whose entries carry CRC-32 checksums. torch does not verify them;
    this does. Without `strict`, archives that other programs packed again, and the format of
    torch before 1.6, which has no checksums, are read too. Raises BadZipFile where a checksum is
    wrong, UserError for what is no ordinary file, and whatever `open` and `torch.load` raise.
    """
    with open_ordinary(path) as file:
        if strict or zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                for entry in archive.infolist():
                    as_written = entry.compress_type == zipfile.ZIP_STORED
                    if strict and (entry.external_attr or not as_written):
                        raise zipfile.BadZipFile(f"the header of {entry.filename} is wrong")
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)
