"""What every client of the matrix asks for: a question, a function, a form, and far too much text."""

QUESTION = "What is the capital of France?"
MESSAGES = [{"role": "user", "content": QUESTION}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
DESCRIPTION = "The weather in a city now."
TOO_LONG = "word " * 20_000


def weather(city):
    """Answer a call of the function."""
    assert city in ("Paris", "Rome"), city
    return f"It rains in {city}."
