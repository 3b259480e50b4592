// Runs the checks of one client against the server named on the command line, and prints a line about each.
import assert from "node:assert";

export const QUESTION = "What is the capital of France?";
export const PARAMETERS = {
  type: "object",
  properties: { city: { type: "string", enum: ["Paris", "Rome"] } },
  required: ["city"],
  additionalProperties: false,
};

export function weather({ city }) {
  assert(["Paris", "Rome"].includes(city));
  return `It rains in ${city}.`;
}

export async function run(checks) {
  const [baseURL, model] = process.argv.slice(2);
  for (const [name, check] of Object.entries(checks)) {
    try {
      console.log(`${name}: ok, ${JSON.stringify(await check(baseURL, model))}`);
    } catch (error) {
      console.log(`${name}: FAILED, ${error.name}: ${error.message}`.replaceAll("\n", " "));
    }
  }
}
