// OpenAI's client of JavaScript: answers, streams, tools, structured output, responses.
import assert from "node:assert";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none" });
const messages = [{ role: "user", content: "Hello?" }];
const ask = { model: "average", messages, max_tokens: 1000 };
const parameters = { type: "object", properties: { sum: { enum: [1, 2] } }, required: ["sum"], additionalProperties: false };
const tools = [{ type: "function", function: { name: "pay", parameters } }];

assert.equal(typeof (await client.chat.completions.create(ask)).choices[0].message.content, "string");
const called = (await client.chat.completions.create({ ...ask, tools, tool_choice: "required" })).choices[0];
assert.equal(called.finish_reason, "tool_calls");
assert.ok([1, 2].includes(JSON.parse(called.message.tool_calls[0].function.arguments).sum));
const stream = client.chat.completions.stream({ ...ask, tools, tool_choice: "required" });
const final = await stream.finalChatCompletion();
assert.ok([1, 2].includes(JSON.parse(final.choices[0].message.tool_calls[0].function.arguments).sum));
const response_format = { type: "json_schema", json_schema: { name: "x", strict: true, schema: parameters } };
const parsed = await client.chat.completions.parse({ ...ask, response_format });
assert.ok([1, 2].includes(parsed.choices[0].message.parsed.sum));
const answer = await client.responses.create({ model: "average", input: "Hello?", max_output_tokens: 8 });
assert.equal(answer.status, "incomplete");
const events = client.responses.stream({
  model: "average", input: "Hello?", max_output_tokens: 1000,
  text: { format: { type: "json_schema", name: "x", strict: true, schema: parameters } },
});
assert.ok([1, 2].includes(JSON.parse((await events.finalResponse()).output_text).sum));
