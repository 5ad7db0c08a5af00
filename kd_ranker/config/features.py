"""Features of a user's own log, for `config.data.features`."""

from ml_collections import ConfigDict


def feature(
    of: str,
    kind: str,
    column: str = "",
    hashed: bool = False,
    size: int = 100_000,
    length: int = 1,
    standardise: bool = True,
    cheap: bool = True,
) -> ConfigDict:
    """One feature of `config.data.features`.

    Args:
      of: what it belongs to: "user" or "context" (one value a request), "item" (one value an item,
        whatever the request), or "candidate" (differs from request to request).
      kind: "dense", a number, or a list of `length` of them, such as an embedding; "category", a
        whole number or text; "bag", a list of these without an order; or "history", a list of item
        ids, the most recent last, of the user.
      column: its column; "" is the feature's own name.
      hashed: of a category or bag, whether values are hashed into `size` buckets; else the `size`
        most frequent values of training requests get a number each.
      size: see `hashed`.
      length: how many values to keep: of a bag the first ones, of a history the last ones; and how
        many numbers a dense one has.
      standardise: of a dense one, whether to subtract the mean of training requests and divide by
        their standard deviation.
      cheap: of a dense one of an item, whether the early ranker can afford it; if not, it is for
        the final ranker alone.
    """
    return ConfigDict(
        dict(
            of=of,
            kind=kind,
            column=column,
            hashed=hashed,
            size=size,
            length=length,
            standardise=standardise,
            cheap=cheap,
        )
    )
