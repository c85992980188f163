"""What the columns of a dataset mean: the names of their numbers."""

from typing import Any


def joint_names(features: dict[str, Any], key: str, count: int) -> list[str]:
    """The dataset's names of a column's `count` numbers; key[i] where it has none that fit.

    Datasets nest names in lists or mappings: the innermost ones along the first entries count.
    """
    names = features.get(key, {}).get("names") or []
    inner = names
    while isinstance(inner, list | dict) and inner:
        names = inner
        inner = next(iter(inner.values() if isinstance(inner, dict) else inner))
    if len(names) == count:
        return [str(name) for name in names]
    return [f"{key}[{i}]" for i in range(count)]
