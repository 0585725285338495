// `fetch` as a page has it: what the Fetch standard has a browser do with a request to another origin. `log` has the
// requests that went out, the preflights among them.

// What a page may send without asking, and what of an answer it may see without being allowed more.
const SAFE_METHODS = ['GET', 'HEAD', 'POST'];
const SAFE_HEADERS = ['accept', 'accept-language', 'content-language'];
const SAFE_TYPES = ['application/x-www-form-urlencoded', 'multipart/form-data', 'text/plain'];
const VISIBLE = ['cache-control', 'content-language', 'content-length', 'content-type', 'expires', 'last-modified', 'pragma'];

const list = value => (value ?? '').split(',').map(one => one.trim()).filter(Boolean);

const safe = (name, value) =>
  SAFE_HEADERS.includes(name) || (name === 'content-type' && SAFE_TYPES.includes(value.split(';')[0].trim()));

const refused = why => new TypeError(`Failed to fetch: ${why}`);

export function asABrowser(origin) {
  const log = [];

  const allowed = answer => ['*', origin].includes(answer.headers.get('access-control-allow-origin'));

  async function preflight(url, method, unsafe) {
    const headers = { origin, 'access-control-request-method': method };
    if (unsafe.length) headers['access-control-request-headers'] = unsafe.join(',');
    const answer = await globalThis.fetch(url, { method: 'OPTIONS', headers, redirect: 'manual' });
    log.push(`OPTIONS ${answer.status}`);
    if (!allowed(answer)) throw refused('the preflight does not allow this origin');
    if (!answer.ok) throw refused(`the preflight was answered with ${answer.status}`);
    const methods = list(answer.headers.get('access-control-allow-methods'));
    if (!SAFE_METHODS.includes(method) && !methods.includes(method) && !methods.includes('*')) {
      throw refused(`the preflight does not allow ${method}`);
    }
    const names = list(answer.headers.get('access-control-allow-headers')).map(name => name.toLowerCase());
    for (const name of unsafe) {
      // `*` does not stand for this one.
      if (!names.includes(name) && !(names.includes('*') && name !== 'authorization')) {
        throw refused(`the preflight does not allow the header ${name}`);
      }
    }
  }

  async function fetch(input, init = {}) {
    const request = new Request(input, { ...init, ...(init.body && { duplex: 'half' }) });
    const headers = new Headers(init.headers ?? request.headers);
    headers.delete('user-agent'); // it is the browser's own to say
    const unsafe = [...headers].filter(([name, value]) => !safe(name, value)).map(([name]) => name).sort();
    if (unsafe.length || !SAFE_METHODS.includes(request.method)) await preflight(request.url, request.method, unsafe);
    headers.set('origin', origin);
    const answer = await globalThis.fetch(input, { ...init, headers });
    log.push(`${request.method} ${answer.status}`);
    if (!allowed(answer)) {
      await answer.body?.cancel();
      throw refused(`the answer (${answer.status}) does not allow this origin`);
    }
    const shown = [...VISIBLE, ...list(answer.headers.get('access-control-expose-headers')).map(name => name.toLowerCase())];
    const seen = [...answer.headers].filter(([name]) => shown.includes(name));
    return new Response(answer.body, { status: answer.status, statusText: answer.statusText, headers: seen });
  }

  return { fetch, log };
}
