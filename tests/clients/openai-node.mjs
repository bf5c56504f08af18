// openai for Node. `node openai-node.mjs ADDRESS CASE` → a line of JSON: what the client understood.
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [address, name] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: "any", maxRetries: 0 });
const asked = (text) => ({ model: "x", messages: [{ role: "user", content: text }] });
const parameters = {
  type: "object",
  properties: { city: { type: "string" }, days: { type: "integer" } },
  required: ["city", "days"],
  additionalProperties: false,
};
const weather = { name: "weather", description: "The weather of a city", parameters, strict: true };
const form = z.object({ a: z.enum(["one", "two"]) });

function tools(calls) {
  const run = (given) => {
    calls.push({ name: "weather", arguments: given });
    return `plover-${given.days} in ${given.city}`;
  };
  return [{ type: "function", function: { ...weather, parse: JSON.parse, function: run } }];
}

const cases = {
  async chat() {
    const made = await client.chat.completions.create(asked("hi"));
    const [choice] = made.choices;
    return { text: choice.message.content, reason: choice.finish_reason, tokens: made.usage.completion_tokens };
  },
  async stream() {
    const drafts = { diffusion: { drafts: "tokens" } };
    const told = { text: "", reason: [], usage: null };
    const stream = { ...asked("hi"), stream: true, stream_options: { include_usage: true }, ...drafts };
    for await (const chunk of await client.chat.completions.create(stream)) {
      for (const choice of chunk.choices) {
        told.text += choice.delta.content ?? "";
        if (choice.finish_reason) told.reason.push(choice.finish_reason);
      }
      told.usage = chunk.usage ?? told.usage;
    }
    const whole = await client.chat.completions.stream({ ...asked("hi"), ...drafts }).finalChatCompletion();
    return { ...told, again: whole.choices[0].message.content };
  },
  async tools() {
    const calls = [];
    const runner = client.chat.completions.runTools({ ...asked("The weather?"), tools: tools(calls) });
    return { text: await runner.finalContent(), calls };
  },
  async streamed_tools() {
    const calls = [];
    const runner = client.chat.completions.runTools({ ...asked("The weather?"), tools: tools(calls), stream: true });
    return { text: await runner.finalContent(), calls };
  },
  async structured() {
    const format = { response_format: zodResponseFormat(form, "answer") };
    const made = await client.chat.completions.parse({ ...asked("one or two?"), ...format });
    return made.choices[0].message.parsed;
  },
  async errors() {
    try {
      await client.chat.completions.create({ ...asked("hi"), temperature: -1 });
    } catch (error) {
      return { kind: error.constructor.name, status: error.status, param: error.param, message: error.message };
    }
  },
  async models() {
    const found = [];
    for await (const model of client.models.list()) found.push(model.id);
    return { found, one: (await client.models.retrieve(found[0])).id };
  },
  async responses_structured() {
    const text = { format: zodTextFormat(form, "answer") };
    return (await client.responses.parse({ model: "x", input: "one or two?", text })).output_parsed;
  },
  async responses_errors() {
    try {
      await client.responses.create({ model: "x", input: "hi", temperature: -1 });
    } catch (error) {
      return { kind: error.constructor.name, status: error.status, param: error.param, message: error.message };
    }
  },
  async responses() {
    const tool = { type: "function", ...weather };
    const one = await client.responses.create({ model: "x", input: "The weather?", tools: [tool] });
    const calls = one.output.filter((item) => item.type === "function_call");
    const output = "plover-3 in Rome";
    const input = calls.map((call) => ({ type: "function_call_output", call_id: call.call_id, output }));
    const stream = client.responses.stream({ model: "x", previous_response_id: one.id, input, tools: [tool] });
    const kinds = [];
    for await (const event of stream) kinds.push(event.type);
    const said = (await stream.finalResponse()).output_text;
    return { text: said, calls: calls.map((c) => ({ name: c.name, arguments: JSON.parse(c.arguments) })), kinds };
  },
};

console.log(JSON.stringify(await cases[name]()));
