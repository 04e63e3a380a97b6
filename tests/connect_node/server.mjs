// Both services by Connect-ES. It verifies each token's signature and expiry against the issuer's keys, and refuses the
// tokens that it was told to refuse.
//
//     node server.mjs '{"descriptors": "file with a FileDescriptorSet", "jwks": {"keys": [...]}}'
//
// prints {"h1": port, "h2c": port} when it is ready; ends when its standard input does.
import { createPublicKey, verify } from 'node:crypto';
import { readFileSync } from 'node:fs';
import http from 'node:http';
import http2 from 'node:http2';
import { createFileRegistry, fromBinary } from '@bufbuild/protobuf';
import { FileDescriptorSetSchema } from '@bufbuild/protobuf/wkt';
import { Code, ConnectError } from '@connectrpc/connect';
import { connectNodeAdapter } from '@connectrpc/connect-node';

const { descriptors, jwks } = JSON.parse(process.argv[2]);
const registry = createFileRegistry(fromBinary(FileDescriptorSetSchema, readFileSync(descriptors)));
const keys = new Map(jwks.keys.map((jwk) => [jwk.kid, createPublicKey({ key: jwk, format: 'jwk' })]));
const refused = new Map(); // token -> how it is refused: {challenge, after}
let log = [];

const json = (part) => JSON.parse(Buffer.from(part, 'base64url').toString());

const whyStale = (token) => {
  const [head, claims, signature] = token.split('.');
  if (!signature) return 'no token';
  const key = keys.get(json(head).kid);
  if (!key || !verify('sha256', Buffer.from(`${head}.${claims}`), key, Buffer.from(signature, 'base64url')))
    return 'the signature is wrong';
  if (json(claims).exp * 1000 <= Date.now()) return 'the token has expired';
  return refused.has(token) && !refused.get(token).after ? 'the token was revoked' : null;
};

const unauthenticated = (why, challenge = 'Bearer error="invalid_token"') =>
  new ConnectError(why, Code.Unauthenticated, { 'www-authenticate': challenge, 'x-attempt': 'refused' });

const authenticate = (next) => async (request) => {
  const header = request.header.get('authorization') ?? '';
  const token = header.replace(/^Bearer /, '');
  const entry = {
    method: request.method.name,
    token,
    kept: request.header.get('x-kept'),
    timeout: request.header.get('connect-timeout-ms') ?? request.header.get('grpc-timeout'),
    http: request.requestMethod,
    outcome: 'refused',
  };
  log.push(entry);
  const why = whyStale(token);
  if (why) throw unauthenticated(why, refused.get(token)?.challenge);
  const response = await next(request);
  response.header.set('x-attempt', 'accepted');
  response.trailer.set('x-trailing', 'accepted');
  entry.outcome = 'executed';
  return response;
};

// Refuses within a stream, once so many requests have come.
const admit = (context, received) => {
  const token = (context.requestHeader.get('authorization') ?? '').replace(/^Bearer /, '');
  const after = refused.get(token)?.after;
  if (after && received >= after) throw unauthenticated('the token was revoked meanwhile');
};

const ALLOW = 1;
const ACTIVE = 1;

const routes = (router) => {
  router.service(registry.getService('kontext.agent.v1.HeartbeatService'), {
    heartbeat: (request) => ({ sequence: request.sequence, state: ACTIVE }),
    getSession: (request) => ({ sessionId: request.sessionId, state: ACTIVE }),
    async *watchSession(request) {
      for (let i = 1; i <= request.maxMessages; i++)
        yield { sessionId: request.sessionId, sequence: BigInt(i), state: ACTIVE };
    },
  });
  router.service(registry.getService('kontext.agent.v1.EventService'), {
    processHookEvent: (request) => ({ decision: ALLOW, eventId: request.event.eventId }),
    async ingestEvents(requests, context) {
      const eventIds = [];
      for await (const request of requests) {
        eventIds.push(request.event.eventId);
        admit(context, eventIds.length);
      }
      return { accepted: BigInt(eventIds.length), eventIds };
    },
    async *streamHookEvents(requests, context) {
      let received = 0;
      for await (const request of requests) {
        admit(context, ++received);
        yield { decision: ALLOW, eventId: request.event.eventId };
      }
    },
  });
};

const connect = connectNodeAdapter({ routes, interceptors: [authenticate] });

const handle = (request, response) => {
  if (!request.url.startsWith('/_test/')) return connect(request, response);
  let body = '';
  request.on('data', (chunk) => (body += chunk));
  request.on('end', () => {
    if (request.url === '/_test/refuse') {
      const { token, ...how } = JSON.parse(body);
      refused.set(token, how);
    }
    if (request.url === '/_test/log') {
      response.end(JSON.stringify(log));
      log = [];
    } else response.end('{}');
  });
};

const up = (server) => new Promise((ready) => server.listen(0, '127.0.0.1', () => ready(server.address().port)));
const ports = { h1: await up(http.createServer(handle)), h2c: await up(http2.createServer(handle)) };
process.stdout.write(`${JSON.stringify(ports)}\n`);
process.stdin.on('end', () => process.exit(0)).resume();
