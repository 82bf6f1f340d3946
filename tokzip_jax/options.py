"""A dict that can be part of a frozen config."""

from typing import Any, NoReturn


class Options(dict[str, Any]):
    """Options of a method: a dict that cannot change, so that a config which holds it can be compared and hashed."""

    def __hash__(self) -> int:
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[type, tuple[dict[str, Any]]]:
        return Options, (dict(self),)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("options of a config cannot change; make new ones: Options({**old, 'name': value})")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse
