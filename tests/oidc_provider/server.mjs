// A certified OpenID Provider on loopback, for tests: node server.mjs '{"accessTtl": 5}'
// Prints one line of JSON, {"issuer": …}, when it listens, and ends when its stdin does.
import { generateKeyPairSync } from 'node:crypto';
import { once } from 'node:events';
import http from 'node:http';
import Provider from 'oidc-provider';

// The provider prints its notices on stdout; once the test has closed its end, that would kill the process.
console.log = console.info = console.warn = console.error;

const options = {
  port: 0,
  accessTtl: 5, // seconds
  refreshTtl: 3600,
  deviceTtl: 600,
  rotate: true,
  audience: 'urn:test:api',
  ...JSON.parse(process.argv[2] ?? '{}'),
};

// Listen first: the issuer's name has the port in it.
let handle = (request, response) => response.writeHead(503).end();
const server = http.createServer((request, response) => handle(request, response));
server.listen(options.port, '127.0.0.1');
await once(server, 'listening');
const issuer = `http://127.0.0.1:${server.address().port}`;

const key = generateKeyPairSync('rsa', { modulusLength: 2048 }).privateKey.export({ format: 'jwk' });
const apiScope = 'api.read api.write';

const provider = new Provider(issuer, {
  jwks: { keys: [{ ...key, kid: 'test-key', alg: 'RS256', use: 'sig' }] },
  cookies: { keys: ['test-cookie-key'] },
  scopes: ['openid', 'offline_access', 'email', 'profile', ...apiScope.split(' ')],
  claims: { openid: ['sub'], email: ['email'], profile: ['name'] },
  conformIdTokenClaims: false, // name and email in the id token, as most issuers do it
  findAccount: (ctx, id) => ({
    accountId: id,
    claims: () => ({ sub: id, name: `${id[0].toUpperCase()}${id.slice(1)}`, email: `${id}@example.com` }),
  }),
  rotateRefreshToken: options.rotate,
  issueRefreshToken: (ctx, client, code) =>
    client.grantTypeAllowed('refresh_token') && code.scopes.has('offline_access'),
  ttl: {
    AccessToken: options.accessTtl,
    AuthorizationCode: 60,
    ClientCredentials: options.accessTtl,
    DeviceCode: options.deviceTtl,
    Grant: 86400,
    IdToken: 3600,
    Interaction: 3600,
    RefreshToken: options.refreshTtl,
    Session: 86400,
  },
  features: {
    clientCredentials: { enabled: true },
    devInteractions: { enabled: true },
    deviceFlow: { enabled: true },
    revocation: { enabled: true },
    resourceIndicators: {
      enabled: true,
      defaultResource: () => options.audience,
      useGrantedResource: () => true, // a refresh keeps the audience
      getResourceServerInfo: () => ({
        audience: options.audience,
        scope: apiScope,
        accessTokenTTL: options.accessTtl,
        accessTokenFormat: 'jwt',
        jwt: { sign: { alg: 'RS256' } },
      }),
    },
  },
  clients: [
    {
      client_id: 'native',
      application_type: 'native',
      token_endpoint_auth_method: 'none',
      redirect_uris: ['http://127.0.0.1/callback'], // on any port
      response_types: ['code'],
      grant_types: ['authorization_code', 'refresh_token', 'urn:ietf:params:oauth:grant-type:device_code'],
    },
    ...[
      ['service', 'service-secret', 'client_secret_basic'],
      ['awkward', 'a%b+c/d:e f&g=h', 'client_secret_basic'], // needs all the quoting there is
    ].map(([client_id, client_secret, token_endpoint_auth_method]) => ({
      client_id,
      client_secret,
      token_endpoint_auth_method,
      redirect_uris: [],
      response_types: [],
      grant_types: ['client_credentials'],
    })),
  ],
});
provider.on('server_error', (ctx, error) => console.error('server_error', error));

// What a test may ask for beside the protocol.
const tokenRequests = [];
const controls = {
  // Every token request so far: when (milliseconds) and its status.
  '/_test/log': () => tokenRequests,
  // A refresh token without a browser.
  '/_test/mint': async (query) => {
    const clientId = query.get('client') ?? 'native';
    const scope = query.get('scope') ?? 'openid offline_access api.read';
    const grant = new provider.Grant({ clientId, accountId: 'alice' });
    grant.addOIDCScope(scope);
    grant.addResourceScope(options.audience, scope);
    const grantId = await grant.save();
    const refreshToken = new provider.RefreshToken({
      client: await provider.Client.find(clientId),
      accountId: 'alice',
      grantId,
      scope,
      resource: options.audience,
      gty: 'authorization_code',
      authTime: Math.floor(Date.now() / 1000),
      rotations: 0,
    });
    return { refresh_token: await refreshToken.save(), grant_id: grantId };
  },
  // Ends a session.
  '/_test/revoke-grant': async (query) => {
    await provider.RefreshToken.revokeByGrantId(query.get('id'));
    return {};
  },
};

const protocol = provider.callback();
handle = async (request, response) => {
  const url = new URL(request.url, issuer);
  const control = controls[url.pathname];
  if (control) {
    response.setHeader('content-type', 'application/json');
    response.end(JSON.stringify(await control(url.searchParams)));
    return;
  }
  if (url.pathname === '/token') {
    response.on('finish', () => tokenRequests.push({ at: Date.now(), status: response.statusCode }));
  }
  protocol(request, response);
};

process.stdout.write(`${JSON.stringify({ issuer })}\n`);
// A test that is killed leaves nothing behind.
process.stdin.on('end', () => process.exit(0)).resume();
process.on('SIGTERM', () => process.exit(0));
