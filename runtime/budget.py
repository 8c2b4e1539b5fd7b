"""What a stage says of work that its memory has no room for."""


class DoesNotFit(Exception):
    """No way of doing it keeps within the budget; the message has the numbers."""
