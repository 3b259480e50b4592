// Vercel's AI SDK with its default provider, which speaks the route of responses.
import assert from "node:assert";
import { createOpenAI } from "@ai-sdk/openai";
import { generateObject, generateText, jsonSchema, stepCountIs, streamText, tool } from "ai";
import { z } from "zod";
import { PARAMETERS, QUESTION, run, weather } from "./check.mjs";

const provider = (baseURL) => createOpenAI({ baseURL, apiKey: "none" });
const common = { temperature: 0, maxOutputTokens: 60, maxRetries: 0 };
const stateless = { providerOptions: { openai: { store: false } } };

await run({
  async text(baseURL, model) {
    const fields = { ...common, model: provider(baseURL)(model), prompt: QUESTION, maxOutputTokens: 16 };
    const whole = (await generateText(fields)).text;
    let text = "";
    for await (const part of streamText(fields).textStream) text += part;
    assert.equal(text, whole);
    return whole;
  },
  async object(baseURL, model) {
    const schema = z.object({ in_france: z.boolean() });
    return (await generateObject({ ...common, model: provider(baseURL)(model), prompt: QUESTION, schema })).object;
  },
  async tools(baseURL, model) {
    const calls = [];
    const execute = async (given) => { calls.push(given); return weather(given); };
    const found = await generateText({
      ...common,
      ...stateless,
      model: provider(baseURL)(model),
      prompt: "How is the weather in Rome?",
      tools: { weather: tool({ description: "The weather in a city now.", inputSchema: jsonSchema(PARAMETERS), execute }) },
      prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "none" }),
      stopWhen: stepCountIs(2),
    });
    assert(calls.length > 0 && found.steps.length === 2);
    return { calls, text: found.text };
  },
  async conversation(baseURL, model) {
    const messages = [{ role: "user", content: QUESTION }];
    const fields = { ...common, ...stateless, model: provider(baseURL)(model) };
    const first = await generateText({ ...fields, messages });
    messages.push(...first.response.messages, { role: "user", content: "And of Italy?" });
    return (await generateText({ ...fields, messages })).text;
  },
});
