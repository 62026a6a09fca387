"""x"""


def chrome_trace(timelines: object) -> str:
    raise NotImplementedError
