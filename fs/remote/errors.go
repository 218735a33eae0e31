package remote

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"syscall"

	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
)

// imageError names the image that an error is about, once.
type imageError struct {
	ref Reference
	err error
}

func (e *imageError) Error() string { return fmt.Sprintf("image %v: %v", e.ref, e.err) }
func (e *imageError) Unwrap() error { return e.err }

// wrap names the image in an error that does not name it yet.
func wrap(ref Reference, err error) error {
	var named *imageError
	if err == nil || errors.As(err, &named) {
		return err
	}
	return &imageError{ref, err}
}

// denied is the error for credentials that are missing, wrong, or not enough.
type denied struct {
	host, user, why string
}

func (d *denied) Error() string {
	who := "nobody is logged in there"
	if d.user != "" {
		who = fmt.Sprintf("the login is %s's", clean(d.user))
	}
	return fmt.Sprintf("%s refuses access (%s; %s): check the image's name and run docker login %s; credentials are read from $DOCKER_CONFIG/config.json or ~/.docker/config.json, with its credential helpers, or podman's auth.json",
		d.host, d.why, who, d.host)
}

// explain says in a user's words why host gave no answer, and whether asking again may help.
func (e *endpoint) explain(ctx context.Context, w *want, host string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("%s: %w", w.what, context.Cause(ctx))
	}
	var (
		dns       *net.DNSError
		authority x509.UnknownAuthorityError
		cert      *tls.CertificateVerificationError
		alert     tls.AlertError
		token     *transport.Error
		refusal   *denied
	)
	switch {
	case errors.As(err, &refusal):
		return err
	case errors.As(err, &token):
		err = fmt.Errorf("%s: the token server of %s answered %d %s", w.what, host, token.StatusCode, http.StatusText(token.StatusCode))
		if temporary(token.StatusCode) {
			return &transient{err: err}
		}
		return err
	case errors.As(err, &authority):
		return fmt.Errorf("the certificate of %s is not trusted (%w): if it is your own registry, add its CA to the system's certificates (update-ca-certificates) or name a file with it in SSL_CERT_FILE", host, err)
	case errors.As(err, &cert):
		return fmt.Errorf("the certificate of %s is not valid for it: %w", host, err)
	case errors.As(err, &alert):
		return fmt.Errorf("%s refuses the TLS that is spoken here: %w", host, err)
	case isPlain(err):
		return fmt.Errorf("%s does not speak TLS (%w): without, only registries on this machine, in private networks, and named with http:// in a hosts.toml are accepted", host, err)
	case errors.As(err, &dns) && dns.IsNotFound:
		return fmt.Errorf("there is no host %s (%w): check the registry's name", host, err)
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		err = fmt.Errorf("nothing answers at %s (%w): check the registry's name and port, and that it runs", host, err)
		if host == e.host && !e.answered.Load() {
			return err // it never answered: more likely it is misspelt than restarting
		}
		return &transient{err: err}
	case isBroken(err):
		return &transient{err: fmt.Errorf("%s: %s: %w", w.what, host, err)}
	}
	return fmt.Errorf("%s: %s: %w", w.what, host, err)
}

// isBroken reports whether a connection broke or timed out, so that another may not.
func isBroken(err error) bool {
	var ne net.Error
	var op *net.OpError
	if errors.As(err, &ne) && ne.Timeout() || errors.As(err, &op) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return true
	}
	// net/http does not export these.
	for _, s := range []string{"http2: ", "stream error: ", "server closed idle connection", "connection broken"} {
		if strings.Contains(err.Error(), s) {
			return true
		}
	}
	return false
}

// speaksNoTLS reports whether a TLS handshake failed as it does with a server that
// speaks HTTP only, or refuses TLS. A certificate that is not trusted is no such thing.
func speaksNoTLS(err error) bool {
	var dial *net.OpError
	return isPlain(err) ||
		errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) ||
		errors.As(err, &dial) && dial.Op == "dial" && errors.Is(err, syscall.ECONNREFUSED) // port 443; 80 may be open
}

// isPlain reports whether the answer to a TLS handshake was something else, such as HTTP.
func isPlain(err error) bool {
	var rh tls.RecordHeaderError
	return errors.Is(err, http.ErrSchemeMismatch) || errors.As(err, &rh)
}

func temporary(status int) bool {
	return status >= 500 && status != http.StatusNotImplemented || status == http.StatusTooManyRequests || status == http.StatusRequestTimeout
}

// refused says what an answer without the wanted bytes means.
func (e *endpoint) refused(w *want, resp *http.Response) error {
	status := fmt.Sprintf("%d %s", resp.StatusCode, http.StatusText(resp.StatusCode))
	var said *transport.Error
	if err := transport.CheckError(resp); errors.As(err, &said) && len(said.Errors) > 0 {
		status += ", " + clean(fmt.Sprintf("%.60s %.200s", said.Errors[0].Code, said.Errors[0].Message))
	}
	host := resp.Request.URL.Host
	switch code := resp.StatusCode; {
	case (code == http.StatusUnauthorized || code == http.StatusForbidden) && host == e.host:
		return &denied{host: e.auth.repo.RegistryStr(), user: e.auth.current().user, why: status}
	case code == http.StatusNotFound && w.blob == nil:
		return fmt.Errorf("%w: %s has no such repository, tag or digest (%s): check the image's name", ErrNotFound, host, status)
	case code == http.StatusNotFound:
		return fmt.Errorf("%s: %w: %s does not have it (%s), so the image is not complete there: push it again", w.what, ErrNotFound, host, status)
	case code == http.StatusRequestedRangeNotSatisfiable:
		return fmt.Errorf("%s: bytes %d to %d do not exist at %s (%s), and the manifest says there are %d: push the image again", w.what, w.off, w.off+w.n-1, host, status, w.blob.size)
	case temporary(code):
		return &transient{err: fmt.Errorf("%s: %s answered %s: try again later", w.what, host, status), after: retryAfter(resp)}
	}
	return fmt.Errorf("%s: %s answered %s", w.what, host, status)
}

// clean returns s for a terminal: what a stranger wrote may hold control characters.
func clean(s string) string {
	q := strconv.Quote(s)
	return strings.ReplaceAll(q[1:len(q)-1], `\"`, `"`)
}
