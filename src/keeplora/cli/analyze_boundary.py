def boundary() -> None:
    pass
