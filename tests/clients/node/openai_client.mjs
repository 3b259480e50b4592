// The `openai` package of npm: conversations, responses, runTools, and objects of a form.
import assert from "node:assert";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import { PARAMETERS, QUESTION, run, weather } from "./check.mjs";

const City = z.object({ in_france: z.boolean() });
const messages = [{ role: "user", content: QUESTION }];
const client = (baseURL) => new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });

await run({
  async chat(baseURL, model) {
    const fields = { model, messages, temperature: 0, max_tokens: 16 };
    const whole = (await client(baseURL).chat.completions.create(fields)).choices[0].message.content;
    let text = "";
    for await (const part of await client(baseURL).chat.completions.create({ ...fields, stream: true })) {
      text += part.choices[0]?.delta?.content ?? "";
    }
    assert.equal(text, whole);
    return whole;
  },
  async responses(baseURL, model) {
    const fields = { model, input: QUESTION, temperature: 0, max_output_tokens: 16 };
    const whole = (await client(baseURL).responses.create(fields)).output_text;
    let text = "";
    for await (const event of await client(baseURL).responses.create({ ...fields, stream: true })) {
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    assert.equal(text, whole);
    return whole;
  },
  async runTools(baseURL, model) {
    const calls = [];
    const call = (given) => { calls.push(given); return weather(given); };
    const tool = { type: "function", function: { name: "weather", parameters: PARAMETERS, parse: JSON.parse, function: call } };
    const runner = client(baseURL).chat.completions.runTools({
      model,
      messages: [{ role: "user", content: "How is the weather in Rome?" }],
      tools: [tool],
      tool_choice: { type: "function", function: { name: "weather" } },
      temperature: 0,
      max_tokens: 60,
    });
    await runner.done();
    assert.equal(calls.length, 1);
    return calls;
  },
  async parse(baseURL, model) {
    const chat = await client(baseURL).chat.completions.parse({
      model, messages, temperature: 0, response_format: zodResponseFormat(City, "city"),
    });
    const response = await client(baseURL).responses.parse({
      model, input: QUESTION, temperature: 0, text: { format: zodTextFormat(City, "city") },
    });
    assert.deepEqual(chat.choices[0].message.parsed, response.output_parsed);
    return response.output_parsed;
  },
});
