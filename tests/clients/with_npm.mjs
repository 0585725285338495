// The clients from npm, as a program of their own: a line of JSON for each request, and one for each answer
// (tests/clients/programs.py).

import { createInterface } from 'node:readline';

import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import Anthropic from '@anthropic-ai/sdk';
import { generateText, streamText } from 'ai';
import OpenAI from 'openai';

import { asABrowser } from './browser.mjs';

// What a client hands on as a part of the stream, and does not throw.
class ErrorEvent extends Error {}

const messages = asked => [{ role: 'user', content: asked.prompt }];

async function* openai(asked, more = {}) {
  const options = { baseURL: asked.url, apiKey: asked.key, defaultHeaders: asked.headers, maxRetries: 0 };
  const client = new OpenAI({ ...options, ...more });
  const body = { model: asked.model, messages: messages(asked), max_tokens: asked.tokens };
  if (asked.do === 'whole') {
    yield (await client.chat.completions.create(body)).choices[0].message.content;
  } else if (asked.do === 'streamed') {
    for await (const chunk of await client.chat.completions.create({ ...body, stream: true })) {
      yield chunk.choices[0]?.delta.content;
    }
  } else if (asked.do === 'models') {
    for await (const model of client.models.list()) yield model.id;
  } else {
    const input = { model: asked.model, input: asked.prompt, max_output_tokens: asked.tokens, stream: true };
    for await (const event of await client.responses.create(input)) {
      if (event.type === 'response.output_text.delta') yield event.delta;
      if (event.type === 'error') throw new ErrorEvent(event.message);
    }
  }
}

// On a page of `asked.origin`.
async function* browser(asked) {
  const { fetch, log } = asABrowser(asked.origin);
  try {
    yield* openai(asked, { fetch, dangerouslyAllowBrowser: true });
  } finally {
    asked.log = log;
  }
}

// A page's own look at a route that is none of the SDK's.
async function* page(asked) {
  const { fetch, log } = asABrowser(asked.origin);
  try {
    const headers = asked.key ? { authorization: `Bearer ${asked.key}` } : {};
    yield `${(await fetch(asked.url, { headers })).status}`;
  } finally {
    asked.log = log;
  }
}

async function* anthropic(asked) {
  const client = new Anthropic({
    baseURL: asked.url,
    ...(asked.token ? { authToken: asked.token } : { apiKey: asked.key }), // it takes one of the two
    defaultHeaders: asked.headers,
    maxRetries: 0,
  });
  const body = { model: asked.model, messages: messages(asked), max_tokens: asked.tokens };
  if (asked.do === 'whole') {
    yield (await client.messages.create(body)).content[0].text;
  } else if (asked.do === 'streamed') {
    for await (const event of client.messages.stream(body)) {
      if (event.type === 'content_block_delta') yield event.delta.text;
    }
  } else {
    const counted = await client.messages.countTokens({ model: asked.model, messages: messages(asked) });
    yield `${counted.input_tokens}`;
  }
}

async function* ai(asked) {
  const provider = createOpenAICompatible({
    name: 'here',
    baseURL: asked.url,
    apiKey: asked.key,
    headers: asked.headers,
  });
  const call = {
    model: provider(asked.model),
    prompt: asked.prompt,
    maxOutputTokens: asked.tokens,
    maxRetries: 0,
    onError: () => {},
  };
  if (asked.do === 'whole') {
    yield (await generateText(call)).text;
  } else {
    for await (const part of streamText(call).fullStream) {
      if (part.type === 'text-delta') yield part.text;
      if (part.type === 'error') throw part.error;
    }
  }
}

const CLIENTS = { openai, browser, page, anthropic, ai };

const tell = content => process.stdout.write(`${JSON.stringify(content)}\n`);

function names(error) {
  const found = [error?.name];
  for (let one = error; (one = Object.getPrototypeOf(one)) && one !== Object.prototype;) {
    found.push(one.constructor.name);
  }
  return found.filter(Boolean);
}

function described(error) {
  const given = error?.responseHeaders ?? error?.headers ?? {};
  return {
    names: names(error),
    status: error?.status ?? error?.statusCode ?? null,
    message: [error?.message ?? JSON.stringify(error), error?.responseBody, error?.cause?.message].filter(Boolean).join(' '),
    headers: given instanceof Headers ? Object.fromEntries(given) : given,
  };
}

async function answer(asked) {
  const pieces = [];
  let error = null;
  try {
    for await (const piece of CLIENTS[asked.client](asked)) {
      if (!piece) continue;
      pieces.push(piece);
      tell({ id: asked.id, piece });
    }
  } catch (caught) {
    error = described(caught);
  }
  tell({ id: asked.id, pieces, error, log: asked.log });
}

tell({ ready: true });
createInterface({ input: process.stdin }).on('line', line => answer(JSON.parse(line)));
