"""Shares and differences as pages and sentences write them."""


def percent(value: float) -> str:
    """Write 0.8123 as 81.2 %."""
    return f"{100 * value:.1f} %"


def signed(value: float) -> str:
    """Write 0.0412 as +4.1, with a true minus and no negative zero."""
    # Adding zero turns a negative zero into zero.
    points = round(100 * value, 1) + 0.0
    return f"{points:+.1f}".replace("-", "\u2212")


def unsigned(value: float) -> str:
    """Write 0.0412 as 4.1, with a true minus where it is negative."""
    return f"{100 * value:.1f}".replace("-", "\u2212")


def span(interval: list[float], plus: bool = False) -> str:
    """Write an interval [low, high] in percent or, with plus, in points."""
    low, high = interval
    if plus:
        return f"{signed(low)} to {signed(high)}"
    return f"{unsigned(low)} to {unsigned(high)}"


def joined(numbers: list[int]) -> str:
    """Write 1, 2, 3, 4, 8 as 1–4, 8: three or more in a row are a range."""
    rows: list[list[int]] = []
    for number in numbers:
        if rows and number == rows[-1][-1] + 1:
            rows[-1].append(number)
        else:
            rows.append([number])
    parts = []
    for row in rows:
        if len(row) > 2:
            parts.append(f"{row[0]}–{row[-1]}")
        else:
            parts.extend(str(number) for number in row)
    return ", ".join(parts)
