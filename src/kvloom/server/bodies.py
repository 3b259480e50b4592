"""Bodies of OpenAI's completions and conversations and of tokenisation: every field that they may have."""

from kvloom.engine.params import MAX_LOGPROBS, MAX_STOP_STRINGS
from kvloom.server.fields import Field, refused, table, unneeded, warned
from kvloom.server.values import (
    AnyOf,
    Boolean,
    Integer,
    ListOf,
    Number,
    Object,
    Text,
    TokenIds,
    Verbatim,
)

MAX_N = 256
MAX_STOP_CHARS = 1024
MAX_NAME_CHARS = 256
MAX_PROMPTS = 1024
MAX_MESSAGES = 4096
MAX_LOGIT_BIASES = 1024
MAX_BAD_WORDS = 256
MAX_CHOICES = 1024

STREAM_OPTIONS = Object({"include_usage": Boolean(), "continuous_usage_stats": Boolean()})

CHOICES = ListOf(Text(least=1), MAX_CHOICES, 1)
FORM = Object(
    {
        "json": AnyOf((Verbatim(), Text())),
        "regex": Text(),
        "choice": CHOICES,
        "grammar": Text(),
        "json_object": Boolean(),
        "disable_any_whitespace": Boolean(),
    },
    open=True,
)
FORMAT = Object(
    {
        "type": Text(choices=("text", "json_object", "json_schema")),
        "json_schema": Object(
            {
                "schema": Verbatim(),
                "json_schema": Verbatim(),
                "name": Text(),
                "strict": Boolean(),
                "description": Text(),
            }
        ),
    },
    required=("type",),
)

MESSAGE = Object(
    {
        "role": Text(least=1, most=64),
        "content": AnyOf((Text(), ListOf(Object({"type": Text(), "text": Text()}, required=("type",))))),
    },
    required=("role",),
    open=True,
)
TOOLS = ListOf(Object({"type": Text()}, required=("type",), open=True), 128)
TOOL_CHOICE = AnyOf((Text(), Object({"type": Text(), "function": Object({"name": Text()})})))

SAMPLING = table(
    Field("model", Text(most=MAX_NAME_CHARS), "A served model name; the first one when absent."),
    Field("n", Integer(1, MAX_N), "Answers to each prompt; the prompt is computed once."),
    Field("temperature", Number(0.0, 100.0), "0 takes the likeliest token."),
    Field("top_p", Number(0.0, 1.0), "Sample among the likeliest tokens that together have this probability."),
    Field("top_k", Integer(-1), "Sample among the K likeliest tokens; 0 and -1 are all."),
    Field("min_p", Number(0.0, 1.0), "Sample among tokens with this share of the best one's probability."),
    Field("seed", Integer(), "Makes sampling repeatable."),
    Field("max_tokens", Integer(-1), "Most tokens of one answer; -1: as many as there is room for."),
    Field("min_tokens", Integer(0), "No end of sequence and no stop before so many tokens."),
    Field(
        "stop",
        AnyOf((Text(MAX_STOP_CHARS, 1), ListOf(Text(MAX_STOP_CHARS, 1), MAX_STOP_STRINGS))),
        "End the answer before any of these texts.",
    ),
    Field("stop_token_ids", ListOf(Integer(0), 1024), "End the answer at any of these tokens."),
    Field("include_stop_str_in_output", Boolean(), "Keep the stop text in the answer."),
    Field("ignore_eos", Boolean(), "Go on past the model's end of sequence."),
    Field("presence_penalty", Number(-2.0, 2.0), "Subtracted from tokens that the answer has already."),
    Field("frequency_penalty", Number(-2.0, 2.0), "Subtracted once per earlier use in the answer."),
    Field("repetition_penalty", Number(0.01, 100.0), "Divides the score of tokens in prompt or answer."),
    Field("logit_bias", Object(), "Added to the scores of tokens, by token id."),
    Field("skip_special_tokens", Boolean(), "Leave control tokens out of the text."),
    Field("prompt_logprobs", Integer(0, MAX_LOGPROBS), "Log-probabilities of the prompt's tokens and of the K best."),
    Field("stream", Boolean(), "Send the answer as server-sent events while it grows."),
    Field("stream_options", STREAM_OPTIONS, "`include_usage` adds a last event with the usage."),
    Field("return_token_ids", Boolean(), "Add `prompt_token_ids` and `token_ids` to the answer."),
    Field("return_tokens_as_token_ids", Boolean(), "Name tokens `token_id:N` in log-probabilities."),
    Field("truncate_prompt_tokens", Integer(-1), "Keep only the last K tokens of a prompt; -1: what the model takes."),
    Field("cache_salt", Text(MAX_NAME_CHARS), "Shares cached prefixes only with requests of the same salt."),
    Field("priority", Integer(-(2**31), 2**31), "Lower runs earlier, with --scheduling-policy priority."),
    Field("request_id", Text(128, 1), "The id of this request in the logs and in the answer's id."),
    Field("kv_policy", Text(MAX_NAME_CHARS), "Policy of the KV cache: eviction and storage."),
    Field("vllm_xargs", Object(), "Further options by name; supported ones count as if in the body."),
    unneeded("user", "The caller's name for its user."),
    unneeded("metadata", "The caller's own notes."),
    unneeded("store", "Asks a hosted service to keep the answer; nothing is kept here."),
    unneeded("service_tier", "A hosted service's price class."),
    unneeded("safety_identifier", "The caller's name for its user."),
    warned("session_id", "A conversation's name; sessions are not kept."),
    warned("prompt_cache_key", "A hosted service's routing hint; use `cache_salt` to separate caches."),
    warned("prompt_cache_retention", "How long a hosted service keeps prefixes."),
    warned("prediction", "A guess of the answer, to speed it up."),
    Field("structured_outputs", FORM, "The form of the answer: one of json, regex, choice, grammar, json_object."),
    Field("guided_json", AnyOf((Verbatim(), Text())), "As `structured_outputs` with `json`."),
    Field("guided_regex", Text(), "As `structured_outputs` with `regex`."),
    Field("guided_choice", CHOICES, "As `structured_outputs` with `choice`."),
    Field("guided_grammar", Text(), "As `structured_outputs` with `grammar`."),
    Field("response_format", FORMAT, "`text`, `json_object`, or `json_schema` with a schema that answers follow."),
    Field("bad_words", ListOf(Text(MAX_STOP_CHARS, 1), MAX_BAD_WORDS), "Words that no answer holds."),
    Field("allowed_token_ids", TokenIds(), "The only tokens that answers may hold."),
    refused("logits_processors", "Code of the caller in the sampler."),
    refused("use_beam_search", "Beam search.", False),
    refused("length_penalty", "A weight of beam search.", 1, 1.0),
    refused("early_stopping", "A rule of beam search.", False),
    refused("spaces_between_special_tokens", "Another way to write control tokens.", True),
    refused("detokenize", "Answers without text.", True),
    refused("kv_transfer_params", "KV caches from another server."),
    refused("lora_request", "Adapters."),
    refused("mm_processor_kwargs", "Options for images and sound.", {}),
)
"""Fields that both kinds of completions take."""

COMPLETION = {
    **SAMPLING,
    **table(
        Field(
            "prompt",
            AnyOf((Text(), TokenIds(), ListOf(Text(), MAX_PROMPTS, 1), ListOf(TokenIds(), MAX_PROMPTS, 1))),
            "Text, token ids, or a list of either.",
            required=True,
        ),
        Field("best_of", Integer(1, MAX_N), "Generate so many answers and return the `n` likeliest per token."),
        Field("echo", Boolean(), "Put the prompt before the answer, with its log-probabilities if asked for."),
        Field("logprobs", Integer(0, MAX_LOGPROBS), "Log-probabilities of each token and of the K best."),
        Field("add_special_tokens", Boolean(), "Let the tokenizer add BOS to prompts of text; the default."),
        refused("suffix", "Text after the answer.", ""),
        refused("prompt_embeds", "Prompts as embeddings."),
    ),
}
"""Body of /v1/completions."""

CHAT = {
    **SAMPLING,
    **table(
        Field("messages", ListOf(MESSAGE, MAX_MESSAGES, 1), "The conversation, in order.", required=True),
        Field("max_completion_tokens", Integer(-1), "Most tokens of one answer; wins over `max_tokens`."),
        Field("logprobs", Boolean(), "Log-probabilities of each token."),
        Field("top_logprobs", Integer(0, MAX_LOGPROBS), "Also of the K best tokens; needs `logprobs`."),
        Field("tools", TOOLS, "Functions that the model may call."),
        Field("tool_choice", TOOL_CHOICE, "`auto`, `none`, `required`, or one function."),
        Field("parallel_tool_calls", Boolean(), "false keeps only the first call."),
        Field("chat_template_kwargs", Object(), "Variables for the chat template."),
        Field("documents", ListOf(Object()), "Variable of templates that have it."),
        Field("add_generation_prompt", Boolean(), "End the prompt where the assistant speaks; the default."),
        Field("continue_final_message", Boolean(), "Go on with the last message instead of starting a new one."),
        Field("allow_special_tokens", Boolean(), "Take control tokens that messages spell for tokens, not for text."),
        Field("reasoning_effort", Text(64), "Variable of templates that have it."),
        refused("add_special_tokens", "BOS beside the one that the template writes.", False),
        refused("echo", "The prompt in the answer; only /v1/completions has it.", False),
        refused("best_of", "Only /v1/completions has it.", 1),
        refused("chat_template", "A template of the caller; start the server with --chat-template."),
        refused("functions", "The old form of `tools`.", []),
        refused("function_call", "The old form of `tool_choice`.", "none"),
        refused("modalities", "Answers other than text.", ["text"]),
        refused("audio", "Spoken answers."),
        refused("web_search_options", "Searching the web."),
        warned("verbosity", "A hosted model's length of answers."),
        refused("include_reasoning", "Leaving reasoning out of the answer.", True),
    ),
}
"""Body of /v1/chat/completions."""

TOKENIZE = table(
    SAMPLING["model"],
    Field("prompt", Text(), "Text to encode; or else `messages`."),
    Field("messages", ListOf(MESSAGE, MAX_MESSAGES, 1), "A conversation to encode."),
    Field("add_special_tokens", Boolean(), "Let the tokenizer add BOS to text; the default."),
    Field("return_token_strs", Boolean(), "Add the tokens as the vocabulary spells them."),
    CHAT["tools"],
    CHAT["chat_template_kwargs"],
    CHAT["add_generation_prompt"],
    CHAT["continue_final_message"],
    CHAT["allow_special_tokens"],
    CHAT["chat_template"],
)
"""Body of /tokenize."""

DETOKENIZE = table(SAMPLING["model"], Field("tokens", TokenIds(least=0), "Token ids to decode.", required=True))
"""Body of /detokenize."""
