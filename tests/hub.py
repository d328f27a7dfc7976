"""A Hugging Face hub made of folders, for tests and for the documentation's code."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest


def stand_in(root: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Put folders below `root` in the hub's place; `calls` of what is returned says what was asked of it."""
    calls: list[tuple] = []

    class Api:
        def __init__(self, token: str | None = None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, **kwargs: Any) -> None:
            calls.append(("create_repo", repo_id, kwargs))

        def create_branch(self, repo_id: str, **kwargs: Any) -> None:
            calls.append(("create_branch", repo_id, kwargs))

        def upload_folder(self, *, repo_id: str, folder_path: str, revision: str | None, commit_message: str) -> Any:
            shutil.copytree(folder_path, root / repo_id / (revision or "main"))
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def download(repo_id: str, revision: str | None = None) -> str:
        folder = root / repo_id / (revision or "main")
        if not folder.is_dir():
            raise huggingface_hub.errors.LocalEntryNotFoundError(f"no {repo_id}")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return SimpleNamespace(root=root, calls=calls)
