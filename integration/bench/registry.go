package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// A registry is docker-registry behind a proxy that counts, at the far end of the link.
type registry struct {
	process *process
	dir     string                                                  // in memory
	dial    func(context.Context, string, string) (net.Conn, error) // past the proxy and the link

	mu    sync.Mutex
	start time.Time
	log   []*request
	link  link
	wrong map[string]func(link) http.Handler // what answers in the place of docker-registry, by path
}

// A request is what the registry was asked. Times are seconds since the start of the run.
type request struct {
	Method string  `json:"method"`
	Path   string  `json:"path"`
	Range  string  `json:"range,omitempty"`
	Status int     `json:"status"` // 0 if the answer has not begun
	Bytes  int64   `json:"bytes"`  // of the answer's body, that were sent
	Begin  float64 `json:"begin"`  // it was here
	First  float64 `json:"first"`  // the answer began
	End    float64 `json:"end"`    // and was sent; 0 if it is not yet
}

// startRegistry starts an empty one with its files in memory.
func startRegistry(n *network, dir string) (*registry, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=90%"); err != nil {
		return nil, fmt.Errorf("tmpfs at %s: %w", dir, err)
	}
	socket, config := filepath.Join(dir, "socket"), filepath.Join(dir, "config.yml")
	if err := os.WriteFile(config, fmt.Appendf(nil, `version: 0.1
log: {level: error, accesslog: {disabled: true}}
storage: {filesystem: {rootdirectory: %s, maxthreads: 1000}, delete: {enabled: true}, cache: {blobdescriptor: inmemory}}
http: {net: unix, addr: %s, relativeurls: true}
`, filepath.Join(dir, "files"), socket), 0o644); err != nil {
		return nil, err
	}
	r := &registry{dir: dir, start: time.Now(), wrong: map[string]func(link) http.Handler{}, dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	var err error
	if r.process, err = startProcess(exec.Command("docker-registry", "serve", config), filepath.Join(dir, "log")); err != nil {
		return nil, err
	}
	if err := r.process.await(func() error {
		c, err := r.dial(context.Background(), "", "")
		if err == nil {
			err = c.Close()
		}
		return err
	}); err != nil {
		return nil, err
	}
	var listener net.Listener
	if err := n.far(func() (err error) { listener, err = net.Listen("tcp", registryHost); return err }); err != nil {
		return nil, err
	}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(&url.URL{Scheme: "http", Host: "registry"})
			p.Out.Host = p.In.Host
		},
		Transport:  &http.Transport{DialContext: r.dial, DisableCompression: true, MaxIdleConnsPerHost: 1000},
		BufferPool: buffers{},
		ErrorLog:   discard, // of clients that hang up
	}
	server := &http.Server{Handler: r.count(r.choose(proxy)), ErrorLog: discard}
	go server.Serve(listener) // as long as the process lives
	return r, nil
}

// buffers are large enough that copying costs little.
type buffers struct{}

var bufferPool = sync.Pool{New: func() any { return make([]byte, 256<<10) }}

func (buffers) Get() []byte  { return bufferPool.Get().([]byte) }
func (buffers) Put(b []byte) { bufferPool.Put(b) }

func (r *registry) count(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		r.mu.Lock()
		e := &request{Method: q.Method, Path: q.URL.Path, Range: q.Header.Get("Range"), Begin: r.since()}
		r.log = append(r.log, e)
		r.mu.Unlock()
		defer func() {
			r.mu.Lock()
			defer r.mu.Unlock()
			e.End = r.since()
		}()
		next.ServeHTTP(&counted{w, r, e}, q)
	})
}

// choose has what is to be wrong answered by what is.
func (r *registry) choose(proxy http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		r.mu.Lock()
		h, l := r.wrong[q.URL.Path], r.link
		r.mu.Unlock()
		if h != nil {
			h(l).ServeHTTP(w, q)
			return
		}
		proxy.ServeHTTP(w, q)
	})
}

// instead has what is asked for behind the link at a path answered by what h makes for the link.
func (r *registry) instead(path string, h func(link) http.Handler) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.wrong[path] = h
}

// over says what the link is.
func (r *registry) over(l link) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.link = l
}

// since returns the seconds since the start of the run; r.mu is held.
func (r *registry) since() float64 { return float64(time.Since(r.start).Microseconds()) / 1e6 }

// reset begins a new log.
func (r *registry) reset(start time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.start, r.log = start, nil
}

// traffic returns the log up to now, and the bytes of all answers in it.
func (r *registry) traffic() (log []request, bytes int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range r.log {
		log = append(log, *e)
		bytes += e.Bytes
	}
	return log, bytes
}

type counted struct {
	http.ResponseWriter
	r *registry
	e *request
}

func (c *counted) Unwrap() http.ResponseWriter { return c.ResponseWriter }

func (c *counted) WriteHeader(status int) {
	c.r.mu.Lock()
	c.e.Status, c.e.First = status, c.r.since()
	c.r.mu.Unlock()
	c.ResponseWriter.WriteHeader(status)
}

func (c *counted) Write(b []byte) (int, error) {
	n, err := c.ResponseWriter.Write(b)
	c.r.mu.Lock()
	c.e.Bytes += int64(n)
	c.r.mu.Unlock()
	return n, err
}
