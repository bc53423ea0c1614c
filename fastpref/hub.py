"""Hub: records of a Hugging Face dataset, saved on disk or on the hub, read as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any


class HubRecords:
    """Records of one split; images and videos come as their bytes, undecoded.

    Raises:
        ValueError: nothing there can be loaded, or the split does not exist.
    """

    def __init__(self, data: str, split: str) -> None:
        path = Path(data)
        self.name = data
        self.root = path if path.is_dir() else Path()
        try:
            import datasets
        except ModuleNotFoundError:
            raise ValueError(
                f"data {data}: no metadata.jsonl, metadata.csv or metadata.parquet there; "
                "for a Hugging Face dataset install the package datasets"
            ) from None
        try:
            if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
                stored = datasets.load_from_disk(data)
                stored = stored[split] if isinstance(stored, datasets.DatasetDict) else stored
            else:
                stored = datasets.load_dataset(data, split=split, streaming=True)
        except Exception as error:  # datasets raises errors of many libraries
            reason = " ".join(str(error).split())[:160]
            raise ValueError(
                f"data {data}: expected a folder with metadata.jsonl, metadata.csv or "
                f"metadata.parquet, such a file, or a Hugging Face dataset ({reason})"
            ) from None
        features = stored.features or {}
        for name, feature in features.items():
            if isinstance(feature, (datasets.Image, datasets.Video)):
                stored = stored.cast_column(name, type(feature)(decode=False))
        self._records = stored
        self.columns: list[str] | None = stored.column_names
        self.total = len(stored) if hasattr(stored, "__len__") else None

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for row, record in enumerate(self._records, 1):
            yield f"row {row}", record
