// The AI SDK. `node ai-sdk.mjs ADDRESS CASE PROVIDER` → a line of JSON: what it understood.
// "compatible" speaks chat completions, "openai" speaks responses.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, isStepCount, Output, streamText, tool } from "ai";
import { z } from "zod";

const [address, name, provider] = process.argv.slice(2);
const at = { baseURL: `${address}/v1`, apiKey: "any" };
const providers = {
  compatible: () => createOpenAICompatible({ name: "local", ...at, supportsStructuredOutputs: true })("x"),
  openai: () => createOpenAI(at)("x"),
};
const base = { model: providers[provider](), maxRetries: 0 };

function rounds(calls) {
  const weather = tool({
    description: "The weather of a city",
    inputSchema: z.object({ city: z.string(), days: z.number().int() }),
    execute: async (given) => {
      calls.push({ name: "weather", arguments: given });
      return `plover-${given.days} in ${given.city}`;
    },
  });
  return { ...base, prompt: "The weather?", tools: { weather }, stopWhen: isStepCount(3) };
}

const cases = {
  async chat() {
    const made = await generateText({ ...base, prompt: "hi" });
    return { text: made.text, reason: made.finishReason, tokens: made.usage.outputTokens };
  },
  async stream() {
    const made = streamText({ ...base, prompt: "hi" });
    let text = "";
    for await (const part of made.textStream) text += part;
    return { text, reason: [await made.finishReason], usage: await made.usage };
  },
  async tools() {
    const calls = [];
    const made = await generateText(rounds(calls));
    return { text: made.text, calls, thoughts: made.reasoningText };
  },
  async streamed_tools() {
    const calls = [];
    const made = streamText(rounds(calls));
    const kinds = [];
    for await (const part of made.fullStream) kinds.push(part.type);
    return { text: await made.text, calls, thoughts: await made.reasoningText, kinds };
  },
  async structured() {
    const schema = z.object({ a: z.enum(["one", "two"]) });
    const made = await generateText({ ...base, prompt: "one or two?", output: Output.object({ schema }) });
    return made.output;
  },
  async errors() {
    try {
      await generateText({ ...base, prompt: "hi", temperature: -1 });
    } catch (error) {
      const kind = APICallError.isInstance(error) ? "APICallError" : error.constructor.name;
      return { kind, status: error.statusCode, message: error.message };
    }
  },
};

console.log(JSON.stringify(await cases[name]()));
