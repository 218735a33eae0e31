package remote

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"sync/atomic"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
)

// endpoint is one host that may have a repository's content: the registry itself, or a mirror of it. Everything that is
// learned of a host is in here, so that nothing of one, least of all its credentials, gets to another.
type endpoint struct {
	host   string // with the port if it is not the scheme's
	base   string // path of the repository, with a slash at its end
	query  string // of every request: "ns=NAMESPACE", or ""
	tags   bool   // it is trusted to say what a tag means
	header http.Header
	link   *link
	http   http.RoundTripper // counts
	auth   *auth

	answered atomic.Bool            // the host exists
	scheme   atomic.Pointer[string] // what it speaks, once it has answered
	mayPlain bool                   // HTTP is allowed if HTTPS is not spoken
}

// newEndpoint returns the endpoint of repo's content at h.
func newEndpoint(repo name.Repository, h *host, l *link, stats *counts, opts Options) *endpoint {
	e := &endpoint{tags: h.tags, header: h.header, link: l}
	asked, at, path := repo.Registry, h.at, h.path
	switch {
	case at == name.Registry{}:
		at, path = asked, cmp.Or(path, "/v2")
		e.mayPlain = isNear(at.RegistryStr())
		if opts.PlainHTTP {
			plain := "http"
			e.scheme.Store(&plain)
		}
	case h.scheme == "http" && h.ownTLS() && !h.plainPort():
		e.mayPlain = true // TLS first, as containerd does
	default:
		e.scheme.Store(&h.scheme)
	}
	e.host = at.RegistryStr()
	e.base = path + "/" + repo.RepositoryStr() + "/"
	if ns := namespace(asked.RegistryStr()); ns != namespace(e.host) && (ns != hub || e.host != hubRegistry) {
		e.query = url.Values{"ns": {ns}}.Encode()
	}
	e.http = &counting{e, stats}
	keychain := opts.Keychain
	if keychain == nil {
		keychain = authn.DefaultKeychain
	}
	if e.host == hubRegistry {
		at, _ = name.NewRegistry(name.DefaultRegistry) // by which docker login knows it
	}
	e.auth = newAuth(at.Repo(repo.RepositoryStr()), keychain, e.http)
	return e
}

// within reports whether all that e can be asked is asked of other too, and nothing else is.
func (e *endpoint) within(other *endpoint) bool {
	mine, others := e.scheme.Load(), other.scheme.Load()
	return mine != nil && others != nil && *mine == *others && e.host == other.host && e.base == other.base && e.query == other.query && (other.tags || !e.tags)
}

// isNear reports whether host (with or without a port) is this machine or has an address of a
// private network, where docker too accepts a registry without TLS.
func isNear(host string) bool {
	if h, _, err := net.SplitHostPort(host); err == nil {
		host = h
	}
	host = strings.Trim(host, "[]")
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && (ip.IsLoopback() || ip.IsPrivate())
}

// ask sends a request until it has an answer with the wanted bytes, or an
// error. It knows of redirects, and nothing of retries.
func (e *endpoint) ask(ctx context.Context, w *want) (*http.Response, error) {
	if w.blob != nil {
		if at := w.blob.location.Load(); at != nil && at.from == e {
			resp, err := e.send(ctx, at.to, w, "")
			if err == nil && success(resp.StatusCode) {
				return resp, nil
			}
			// Signed addresses expire, and stores answer that in many ways. Whatever it was, the
			// endpoint is asked again, and only what it says now counts.
			if err == nil {
				discard(resp)
			} else if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			w.blob.location.CompareAndSwap(at, nil)
		}
	}
	host := e.host
	resp, err := e.askHost(ctx, w)
	const maxHops = 5
	for hop := 0; err == nil && isRedirect(resp.StatusCode); hop++ {
		from := resp.Request.URL
		to, lerr := from.Parse(resp.Header.Get("Location"))
		discard(resp)
		switch {
		case hop == maxHops:
			return nil, fmt.Errorf("%s: %s redirects more than %d times", w.what, e.host, maxHops)
		case lerr != nil || resp.Header.Get("Location") == "":
			return nil, fmt.Errorf("%s: %s redirects to nowhere", w.what, e.host)
		case to.Scheme != "https" && (to.Scheme != "http" || from.Scheme == "https" && !isNear(to.Host)):
			return nil, fmt.Errorf("%s: %s redirects to %.100q, which is not protected by TLS", w.what, e.host, to.Scheme+"://"+to.Host)
		}
		host = to.Host
		authorization := ""
		if to.Host == from.Host && to.Host == e.host && to.Scheme == from.Scheme {
			authorization = e.auth.current().header
		}
		if resp, err = e.send(ctx, to, w, authorization); err == nil && success(resp.StatusCode) && w.blob != nil && authorization == "" {
			w.blob.location.Store(&location{to, e})
		}
	}
	if err != nil {
		return nil, e.explain(ctx, w, host, err)
	}
	if !success(resp.StatusCode) {
		defer discard(resp)
		return nil, e.refused(w, resp)
	}
	return resp, nil
}

func success(status int) bool { return status == http.StatusOK || status == http.StatusPartialContent }

func isRedirect(status int) bool {
	return status == http.StatusMovedPermanently || status == http.StatusFound || status == http.StatusSeeOther ||
		status == http.StatusTemporaryRedirect || status == http.StatusPermanentRedirect
}

// discard closes a response that is not wanted; a short body is read first, so that
// the connection can be used again.
func discard(resp *http.Response) {
	if resp.ContentLength >= 0 && resp.ContentLength <= 4<<10 {
		io.Copy(io.Discard, io.LimitReader(resp.Body, 4<<10))
	}
	resp.Body.Close()
}

// askHost sends a request to the host itself, and again with new credentials when it is
// refused: once, unless the keychain has several. 403 counts too: some registries say that of tokens that have expired.
func (e *endpoint) askHost(ctx context.Context, w *want) (*http.Response, error) {
	used := e.auth.current()
	for tried, tries := 0, 0; ; tries++ {
		resp, err := e.sendHost(ctx, w, used.header)
		if err != nil || tries > maxCandidates || resp.StatusCode != http.StatusUnauthorized && resp.StatusCode != http.StatusForbidden {
			return resp, err
		}
		var next *authorization
		next, tried, err = e.auth.renew(ctx, used, resp, tried)
		if err != nil {
			discard(resp)
			return nil, err
		}
		if next == used {
			return resp, nil
		}
		discard(resp)
		used = next
	}
}

// sendHost sends a request by the scheme that the host speaks, and finds out which with the
// first one.
func (e *endpoint) sendHost(ctx context.Context, w *want, authorization string) (*http.Response, error) {
	u := &url.URL{Host: e.host, Path: e.base + w.path, RawQuery: e.query}
	if known := e.scheme.Load(); known != nil {
		u.Scheme = *known
		return e.send(ctx, u, w, authorization)
	}
	u.Scheme = "https"
	resp, err := e.send(ctx, u, w, authorization)
	if err != nil && e.mayPlain && speaksNoTLS(err) {
		plain := *u
		plain.Scheme = "http"
		presp, perr := e.send(ctx, &plain, w, "")
		// A server that does speak TLS answers 400 to HTTP on that port: then TLS broke by chance.
		if perr == nil && presp.StatusCode == http.StatusBadRequest {
			discard(presp)
			return nil, err
		}
		u, resp, err = &plain, presp, perr
	}
	if err == nil {
		e.scheme.CompareAndSwap(nil, &u.Scheme)
	}
	return resp, err
}

// send sends one request, and is all that leaves this machine for content.
func (e *endpoint) send(ctx context.Context, u *url.URL, w *want, authorization string) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	if w.accept != "" {
		req.Header.Set("Accept", w.accept)
	}
	req.Header.Set("Accept-Encoding", "identity")
	if !w.whole() {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-%d", w.off, w.off+w.n-1))
	}
	if authorization != "" {
		req.Header.Set("Authorization", authorization)
	}
	resp, err := e.http.RoundTrip(req)
	switch {
	case u.Host != e.host:
	case err == nil:
		e.answered.Store(true)
		e.link.answered()
	case ctx.Err() == nil:
		e.link.fail()
	}
	return resp, err
}

// RoundTrip sends a request, which it may change, with the headers that are set for the host, if it goes there: they may be secrets. What
// the request says itself counts more.
func (e *endpoint) RoundTrip(req *http.Request) (*http.Response, error) {
	if known := e.scheme.Load(); req.URL.Host == e.host && (known == nil || *known == req.URL.Scheme) {
		for k, v := range e.header {
			if req.Header.Values(k) == nil || k == "User-Agent" {
				req.Header[k] = v
			}
		}
	}
	return e.link.transport.RoundTrip(req)
}
