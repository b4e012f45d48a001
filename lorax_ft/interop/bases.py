"""Which base an adapter belongs to: what an export says of it, and the check of an import."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping
from typing import Any

from lorax_ft import trees
from lorax_ft.leaves import is_leaf
from lorax_ft.models import hub

# Keys of the metadata of an export's tensors.
FINGERPRINT, HELD_AS, WITHOUT = "base_fingerprint", "base_held_as", "base_without"

logger = logging.getLogger(__name__)


def describe(params: Any, without: Collection[str] = ()) -> dict[str, str]:
    """The metadata that names a base: its fingerprint, of what, and how its arrays are held.

    Args:
        params: the base, with adapters or without.
        without: paths, `layers_3/...` of a layer, of the arrays that an adapter brings along and
            that are none of the base's.
    """
    arrays = {
        path: _innermost(value)
        for path, value in trees.flatten(params).items()
        if not path.startswith(("prompt/", "prefix/"))
    }
    held = sorted({trees.kind(a) if is_leaf(a) else str(a.dtype) for a in arrays.values()})
    return {
        FINGERPRINT: hub.fingerprint(arrays, without=without),
        HELD_AS: "+".join(held),
        WITHOUT: json.dumps(sorted(without)),
    }


def check(metadata: Mapping[str, str], params: Any, where: str) -> None:
    """Raises ValueError where `params` are not the base that `metadata` names.

    A base in another precision than it was has another fingerprint, which tells nothing; that is
    reported to `logging`. Nothing is checked of adapters that say nothing of their base, such as
    PEFT's own.
    """
    if FINGERPRINT not in metadata:
        return
    found = describe(params, json.loads(metadata.get(WITHOUT, "[]")))
    if found[HELD_AS] != metadata.get(HELD_AS):
        logger.warning(
            "%s was trained on a base held as %s, and this one is held as %s: whether it is the "
            "same base cannot be told by its fingerprint.",
            where,
            metadata.get(HELD_AS),
            found[HELD_AS],
        )
    elif found[FINGERPRINT] != metadata[FINGERPRINT]:
        raise ValueError(
            f"load_peft: {where} was trained on a base of the fingerprint "
            f"{metadata[FINGERPRINT][:12]}, and this base has {found[FINGERPRINT][:12]}. Load the "
            "base that its README.md names; check_base=False takes this one all the same."
        )


def _innermost(value: Any) -> Any:
    """What adapters are put round."""
    return _innermost(value.base) if hasattr(value, "base") else value
