// The `@anthropic-ai/sdk` package of npm: text, streams and tools.
import assert from "node:assert";
import Anthropic from "@anthropic-ai/sdk";
import { PARAMETERS, QUESTION, run, weather } from "./check.mjs";

const client = (baseURL) => new Anthropic({ baseURL: baseURL.replace(/\/v1$/, ""), apiKey: "none", maxRetries: 0 });

await run({
  async text(baseURL, model) {
    const fields = { model, messages: [{ role: "user", content: QUESTION }], temperature: 0, max_tokens: 16 };
    const whole = (await client(baseURL).messages.create(fields)).content[0].text;
    assert.equal(await client(baseURL).messages.stream(fields).finalText(), whole);
    return whole;
  },
  async tools(baseURL, model) {
    const tools = [{ name: "weather", input_schema: PARAMETERS }];
    const messages = [{ role: "user", content: "How is the weather in Rome?" }];
    const fields = { model, tools, temperature: 0, max_tokens: 60 };
    const tool_choice = { type: "any", disable_parallel_tool_use: true };
    const first = await client(baseURL).messages.stream({ ...fields, messages, tool_choice }).finalMessage();
    const [call] = first.content;
    const result = { type: "tool_result", tool_use_id: call.id, content: weather(call.input) };
    messages.push({ role: "assistant", content: first.content }, { role: "user", content: [result] });
    return (await client(baseURL).messages.create({ ...fields, messages })).content;
  },
});
