"""What several processes of one run tell each other."""

from typing import Any, TypeVar, cast

import ignite.distributed as idist

Part = TypeVar("Part", list[Any], dict[str, str])


def gathered(part: Part) -> list[Part]:
    """Collect the parts of all processes, in the order of their ranks; a single process has its own alone.

    Every process must call this, and all get the same answer.

    Args:
        part: this process's own, of types that can be pickled.
    """
    return cast(list[Part], idist.all_gather(part))
