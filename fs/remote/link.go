package remote

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// link is the way to one host: its connections, and whether they can be made. All Sources of a process
// share the links to hosts that a hosts.toml names, or a dead mirror would cost each of them.
type link struct {
	transport http.RoundTripper
	down      atomic.Pointer[time.Time] // until when the host is asked last; nil is not
}

// downFor is how long a host that did not answer is asked last. So a dead mirror costs each new blob nothing, and
// one that came back is used again soon.
const downFor = 30 * time.Second

func (l *link) fail() {
	until := time.Now().Add(downFor)
	l.down.Store(&until)
}

func (l *link) answered() {
	if l.down.Load() != nil {
		l.down.Store(nil)
	}
}

func (l *link) isDown() bool {
	until := l.down.Load()
	return until != nil && time.Now().Before(*until)
}

// links are those of the process. One whose files changed is replaced, so that there are not more than hosts.
var links struct {
	mu sync.Mutex // not held across I/O
	of map[string]keptLink
}

type keptLink struct {
	files [sha256.Size]byte // what was in them
	link  *link
}

// link returns the way to h, which is at the address: over the process's pool if h has no settings of its own. With given, which is
// Options.Transport, the link is not shared.
func (h *host) link(address string, given http.RoundTripper) (*link, error) {
	pems, err := h.readFiles()
	if err != nil {
		return nil, err
	}
	if given != nil {
		t, err := h.transport(given, pems)
		return &link{transport: t}, err
	}
	key := fmt.Sprintf("%s %s %v %v %q %q", h.scheme, address, h.skipVerify != nil && *h.skipVerify, h.dial, h.ca, h.client)
	sum := sha256.Sum256(fmt.Appendf(nil, "%q", pems))
	links.mu.Lock()
	defer links.mu.Unlock()
	kept, ok := links.of[key]
	if ok && kept.files == sum {
		return kept.link, nil
	}
	t, err := h.transport(sharedTransport(), pems)
	if err != nil {
		return nil, err
	}
	if old, isOwn := kept.link.own(); isOwn {
		old.CloseIdleConnections()
	}
	if links.of == nil {
		links.of = make(map[string]keptLink)
	}
	links.of[key] = keptLink{sum, &link{transport: t}}
	return links.of[key].link, nil
}

// own returns the link's transport if it is not the shared one.
func (l *link) own() (*http.Transport, bool) {
	if l == nil {
		return nil, false
	}
	t, ok := l.transport.(*http.Transport)
	return t, ok && t != sharedTransport()
}

// readFiles returns the contents of all files that h names: the CAs', then each certificate's and its key's.
func (h *host) readFiles() (pems [][]byte, _ error) {
	files := h.ca
	for _, pair := range h.client {
		files = append(files[:len(files):len(files)], pair[0], pair[1])
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			return nil, fmt.Errorf("%s: %w: put the file there, or remove it from ca or client", h.key, err)
		}
		pems = append(pems, b)
	}
	return pems, nil
}

// transport returns base, or a copy of it with the settings of h. Pems is what its files have.
func (h *host) transport(base http.RoundTripper, pems [][]byte) (http.RoundTripper, error) {
	if !h.ownTLS() && h.dial == 0 {
		return base, nil
	}
	shared, ok := base.(*http.Transport)
	if !ok {
		return nil, errors.New(h.key + ": its TLS settings and dial_timeout need a transport that is an *http.Transport")
	}
	t := shared.Clone()
	if t.TLSClientConfig == nil {
		t.TLSClientConfig = new(tls.Config)
	}
	if h.dial > 0 {
		t.DialContext = (&net.Dialer{Timeout: h.dial, KeepAlive: 15 * time.Second}).DialContext
	}
	if h.skipVerify != nil {
		t.TLSClientConfig.InsecureSkipVerify = *h.skipVerify
	}
	if err := h.addCAs(t.TLSClientConfig, pems[:len(h.ca)]); err != nil {
		return nil, err
	}
	return t, h.addClients(t.TLSClientConfig, pems[len(h.ca):])
}

func (h *host) addCAs(c *tls.Config, pems [][]byte) (err error) {
	if len(pems) == 0 {
		return nil
	}
	pool := c.RootCAs
	if pool != nil {
		pool = pool.Clone()
	} else if pool, err = x509.SystemCertPool(); err != nil {
		return fmt.Errorf("%s: the system's certificates: %w", h.key, err)
	}
	for i, pem := range pems {
		if !pool.AppendCertsFromPEM(pem) {
			return fmt.Errorf("%s: ca: %s has no certificate in PEM form: put one there", h.key, h.ca[i])
		}
	}
	c.RootCAs = pool
	return nil
}

func (h *host) addClients(c *tls.Config, pems [][]byte) error {
	for i, pair := range h.client {
		cert, err := tls.X509KeyPair(pems[2*i], pems[2*i+1])
		if err != nil {
			return fmt.Errorf("%s: client: %s and %s: %w: want a certificate and its key in PEM form", h.key, pair[0], pair[1], err)
		}
		c.Certificates = append(c.Certificates, cert)
	}
	return nil
}
