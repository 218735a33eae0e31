package remote

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"strings"
	"sync/atomic"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// auth is what one registry accepts as authorization for one repository. It learns from
// refusals only: go-containerregistry's own transport asks /v2/ before anything else, which
// costs a round trip that most starts do not need.
type auth struct {
	repo     name.Repository
	keychain authn.Keychain
	http     http.RoundTripper

	now atomic.Pointer[authorization]
	// renewing holds one token. It is taken while credentials are renewed, so that the many
	// requests that one expiry refuses renew once. A channel and not a mutex: renewing is
	// I/O, and who waits for it must be able to give up.
	renewing chan struct{}
}

// An authorization is the header to send and how it came about. It does not change.
type authorization struct {
	header    string     // "" is anonymous
	user      string     // whose it is, for errors; "" if nobody's
	challenge *challenge // what the registry asked for; nil before it was asked
}

func newAuth(repo name.Repository, keychain authn.Keychain, t http.RoundTripper) *auth {
	return &auth{repo: repo, keychain: keychain, http: t, renewing: make(chan struct{}, 1)}
}

var anonymous = new(authorization)

func (a *auth) current() *authorization {
	if now := a.now.Load(); now != nil {
		return now
	}
	return anonymous
}

// candidates are all credentials that a keychain has for a target, the likeliest first. Most have one at most.
type candidates interface {
	Candidates(ctx context.Context, target authn.Resource) iter.Seq2[authn.Authenticator, error]
}

// maxCandidates is how many credentials one request tries.
const maxCandidates = 5

// renew returns what to send instead of used, which resp refused, and how many of the keychain's credentials have been tried for the
// request then; tried is how many were before. It returns used itself if there is nothing else to try.
func (a *auth) renew(ctx context.Context, used *authorization, resp *http.Response, tried int) (*authorization, int, error) {
	select {
	case a.renewing <- struct{}{}:
		defer func() { <-a.renewing }()
	case <-ctx.Done():
		return nil, tried, context.Cause(ctx)
	}
	if now := a.current(); now != used {
		return now, tried, nil // renewed while this request was on its way or waited
	}
	c := parseChallenge(resp.Header.Values("WWW-Authenticate"))
	if c == nil {
		c = used.challenge // 403 comes without one
	}
	if c == nil {
		return used, tried, nil
	}
	var failed error
	n := 0
	for creds, err := range a.candidates(ctx) {
		if n++; n <= tried {
			continue
		}
		if n > maxCandidates {
			break
		}
		var next *authorization
		if err == nil {
			next, err = a.authorize(ctx, creds, c, resp)
		} else {
			err = fmt.Errorf("credentials for %s: %w", a.repo.RegistryStr(), err)
		}
		if err != nil && ctx.Err() != nil {
			return nil, n, err
		}
		if err != nil {
			if failed == nil { // the likeliest says most
				failed = err
			}
			continue
		}
		if next != nil {
			a.now.Store(next)
			return next, n, nil
		}
	}
	if failed != nil && tried == 0 {
		return nil, n, failed
	}
	return used, n, nil // what refused the one before says why
}

func (a *auth) candidates(ctx context.Context) iter.Seq2[authn.Authenticator, error] {
	if k, ok := a.keychain.(candidates); ok {
		return k.Candidates(ctx, a.repo)
	}
	return func(yield func(authn.Authenticator, error) bool) { yield(authn.Resolve(ctx, a.keychain, a.repo)) }
}

// authorize returns what credentials make of a challenge, or nil if the registry wants a password and there is none.
func (a *auth) authorize(ctx context.Context, creds authn.Authenticator, c *challenge, resp *http.Response) (*authorization, error) {
	config, err := authn.Authorization(ctx, creds)
	if err != nil {
		return nil, fmt.Errorf("credentials for %s: %w", a.repo.RegistryStr(), err)
	}
	next := &authorization{user: config.Username, challenge: c}
	switch {
	case config.RegistryToken != "":
		next.header = "Bearer " + config.RegistryToken
	case c.scheme == "bearer":
		insecure := resp.Request.URL.Scheme == "http"
		scopes := []string{a.repo.Scope(transport.PullScope)}
		if s := c.parameters["scope"]; s != "" && s != scopes[0] {
			scopes = append(scopes, s)
		}
		token, err := transport.Exchange(ctx, a.repo.Registry, creds, a.http, scopes,
			&transport.Challenge{Scheme: "Bearer", Parameters: c.parameters, Insecure: insecure})
		var terr *transport.Error
		if errors.As(err, &terr) && terr.StatusCode/100 == 4 && terr.StatusCode != http.StatusTooManyRequests {
			return nil, &denied{host: a.repo.RegistryStr(), user: next.user, why: fmt.Sprintf("its token server answered %d %s", terr.StatusCode, http.StatusText(terr.StatusCode))}
		}
		if err != nil {
			return nil, fmt.Errorf("token for %s: %w", a.repo.RegistryStr(), err)
		}
		t := token.Token
		if token.AccessToken != "" {
			t = token.AccessToken
		}
		next.header = "Bearer " + t
	case config.Username != "" || config.Password != "":
		next.header = "Basic " + base64.StdEncoding.EncodeToString([]byte(config.Username+":"+config.Password))
	case config.Auth != "":
		next.header = "Basic " + config.Auth
	default:
		return nil, nil
	}
	if strings.ContainsAny(next.header, "\r\n") {
		return nil, fmt.Errorf("token for %s: it has line breaks", a.repo.RegistryStr())
	}
	return next, nil
}

// A challenge is what a registry wants to see, from WWW-Authenticate (RFC 9110, 11.6.1).
type challenge struct {
	scheme     string            // "bearer" or "basic"
	parameters map[string]string // names in lower case
}

// parseChallenge returns the first challenge that can be met, or nil.
func parseChallenge(headers []string) *challenge {
	var first *challenge
	for _, h := range headers {
		for h != "" {
			var c *challenge
			if c, h = nextChallenge(h); c == nil {
				continue
			}
			if c.scheme == "bearer" && c.parameters["realm"] != "" {
				return c
			}
			if c.scheme == "basic" && first == nil {
				first = c
			}
		}
	}
	return first
}

// nextChallenge cuts one challenge off s, which has those left after the first. It is nil if
// there is none at s's beginning; the rest is always shorter than s.
func nextChallenge(s string) (*challenge, string) {
	s = strings.TrimLeft(s, " \t,")
	scheme, s := cutToken(s)
	if scheme == "" {
		return nil, ""
	}
	c := &challenge{strings.ToLower(scheme), make(map[string]string)}
	for {
		rest := strings.TrimLeft(s, " \t,")
		key, after := cutToken(rest)
		value, ok := strings.CutPrefix(strings.TrimLeft(after, " \t"), "=")
		if key == "" || !ok {
			return c, rest // the next challenge, or the end
		}
		value = strings.TrimLeft(value, " \t")
		if quoted, ok := strings.CutPrefix(value, `"`); ok {
			var b strings.Builder
			i := 0
			for ; i < len(quoted) && quoted[i] != '"'; i++ {
				if quoted[i] == '\\' && i+1 < len(quoted) {
					i++
				}
				b.WriteByte(quoted[i])
			}
			value, s = b.String(), quoted[min(i+1, len(quoted)):]
		} else {
			i := strings.IndexAny(value, " \t,")
			if i < 0 {
				i = len(value)
			}
			value, s = value[:i], value[i:]
		}
		c.parameters[strings.ToLower(key)] = value
	}
}

func cutToken(s string) (token, rest string) {
	i := 0
	for i < len(s) && (s[i] >= 'a' && s[i] <= 'z' || s[i] >= 'A' && s[i] <= 'Z' || s[i] >= '0' && s[i] <= '9' || strings.IndexByte("!#$%&'*+-.^_`|~", s[i]) >= 0) {
		i++
	}
	return s[:i], s[i:]
}
