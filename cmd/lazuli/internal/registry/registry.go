// Package registry is a small registry on one directory, for demos and tests.
//
// It is go-containerregistry's, whose manifests live in memory and whose blobs cannot
// be had by every range that HTTP knows, with two changes: blobs are files, which come
// in as streams and go out through [http.ServeContent], and manifests are written to the
// directory as well and told to the registry again when it is opened. There is no authentication.
//
//	blobs/sha256/HEX           a blob, named after its digest was checked
//	uploads/ID                 a blob that is coming in; emptied at Open
//	manifests/REPO/_/TARGET    a manifest by tag or digest: a line with its media type, then its bytes
//
// Source: the OCI distribution specification
// (https://github.com/opencontainers/distribution-spec/blob/main/spec.md).
package registry

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
)

// The grammar of the distribution specification. A name that it accepts is safe as a path.
var (
	blobPath     = regexp.MustCompile(`^/v2/(` + repository + `)/blobs/sha256:([0-9a-f]{64})$`)
	uploadPath   = regexp.MustCompile(`^/v2/(` + repository + `)/blobs/uploads/([0-9a-f]*)$`)
	manifestPath = regexp.MustCompile(`^/v2/(` + repository + `)/manifests/([a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}|sha256:[0-9a-f]{64})$`)
	digestQuery  = regexp.MustCompile(`^sha256:([0-9a-f]{64})$`)
)

const repository = `[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*`

// maxManifest is what registries accept, 4 MiB.
const maxManifest = 4 << 20

// A Registry is an [http.Handler] that serves one directory. One process at a
// time may use a directory; it may use the Registry from several goroutines.
type Registry struct {
	dir       string
	lock      *os.File
	manifests http.Handler // go-containerregistry's, which does all but blobs
	mu        sync.Mutex   // manifests: memory and disk change together
}

// Open opens the registry in dir, which is made if it is not there.
func Open(dir string) (*Registry, error) {
	r := &Registry{dir: dir}
	for _, d := range []string{"blobs/sha256", "uploads", "manifests"} {
		if err := os.MkdirAll(r.path(d), 0o755); err != nil {
			return nil, err
		}
	}
	lock, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		lock.Close()
		return nil, fmt.Errorf("%s: another registry serves it", dir)
	}
	r.lock = lock
	if err := r.load(); err != nil {
		lock.Close()
		return nil, err
	}
	return r, nil
}

// Close lets another process open the directory. No request may be under way.
func (r *Registry) Close() error { return r.lock.Close() }

func (r *Registry) path(elem ...string) string {
	return filepath.Join(append([]string{r.dir}, elem...)...)
}

// load empties uploads and tells the manifests on disk to the registry in memory.
func (r *Registry) load() error {
	uploads, err := filepath.Glob(r.path("uploads", "*"))
	if err != nil {
		return err
	}
	for _, u := range uploads {
		if err := os.Remove(u); err != nil {
			return err
		}
	}
	r.manifests = registry.New(registry.Logger(log.New(io.Discard, "", 0)),
		registry.WithReferrersSupport(true), registry.WithBlobHandler(noBlobs{}))
	var pending []string
	base := r.path("manifests")
	err = filepath.WalkDir(base, func(p string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			pending = append(pending, p)
		}
		return err
	})
	if err != nil {
		return err
	}
	// An index is accepted after what it lists, so go round until nothing is left.
	for len(pending) > 0 {
		var refused []string
		var last error
		for _, p := range pending {
			rel, _ := filepath.Rel(base, p)
			buf, err := os.ReadFile(p)
			if err != nil {
				return err
			}
			repo, target, ok := strings.Cut(rel, "/_/")
			mediaType, body, ok2 := bytes.Cut(buf, []byte("\n"))
			if !ok || !ok2 {
				return fmt.Errorf("%s: not a manifest that this registry wrote", p)
			}
			req, err := http.NewRequest(http.MethodPut, "/v2/"+repo+"/manifests/"+target, bytes.NewReader(body))
			if err != nil {
				return fmt.Errorf("%s: %w", p, err)
			}
			req.Header.Set("Content-Type", string(mediaType))
			w := &discard{header: http.Header{}}
			if r.manifests.ServeHTTP(w, req); w.status != http.StatusCreated {
				refused, last = append(refused, p), fmt.Errorf("%s: status %d", p, w.status)
			}
		}
		if len(refused) == len(pending) {
			return last
		}
		pending = refused
	}
	return nil
}

// ServeHTTP answers a request of the distribution API.
func (r *Registry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	p := req.URL.Path
	if m := blobPath.FindStringSubmatch(p); m != nil && (req.Method == http.MethodGet || req.Method == http.MethodHead) {
		r.blob(w, req, m[2])
		return
	}
	if m := uploadPath.FindStringSubmatch(p); m != nil {
		r.upload(w, req, m[1], m[2])
		return
	}
	if m := manifestPath.FindStringSubmatch(p); m != nil && (req.Method == http.MethodPut || req.Method == http.MethodDelete) {
		r.manifest(w, req, m[1], m[2])
		return
	}
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", req.Method+" "+p)
		return
	}
	r.manifests.ServeHTTP(w, req)
}

func (r *Registry) blob(w http.ResponseWriter, req *http.Request, sum string) {
	f, err := os.Open(r.path("blobs/sha256", sum))
	if err != nil {
		refuse(w, http.StatusNotFound, "BLOB_UNKNOWN", "sha256:"+sum)
		return
	}
	defer f.Close()
	w.Header().Set("Docker-Content-Digest", "sha256:"+sum)
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, req, "", time.Time{}, f)
}

// upload is POST (begin, mount, or all at once), PATCH (append) and PUT (append and end).
func (r *Registry) upload(w http.ResponseWriter, req *http.Request, repo, id string) {
	q := req.URL.Query()
	file := r.path("uploads", id)
	switch {
	case req.Method == http.MethodPost && id == "":
		if m := digestQuery.FindStringSubmatch(q.Get("mount")); m != nil {
			if _, err := os.Stat(r.path("blobs/sha256", m[1])); err == nil {
				created(w, repo, m[1])
				return
			}
		}
		id = rand.Text()
		id = hex.EncodeToString([]byte(id))
		file = r.path("uploads", id)
		if err := os.WriteFile(file, nil, 0o644); err != nil {
			failed(w, err)
			return
		}
	case (req.Method == http.MethodPatch || req.Method == http.MethodPut) && id != "":
	case req.Method == http.MethodDelete && id != "":
		os.Remove(file)
		w.WriteHeader(http.StatusNoContent)
		return
	default:
		refuse(w, http.StatusMethodNotAllowed, "UNSUPPORTED", req.Method+" "+req.URL.Path)
		return
	}

	f, err := os.OpenFile(file, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		refuse(w, http.StatusNotFound, "BLOB_UPLOAD_UNKNOWN", id)
		return
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		failed(w, err)
		return
	}
	if from, _, ok := strings.Cut(req.Header.Get("Content-Range"), "-"); ok && from != fmt.Sprint(size) {
		refuse(w, http.StatusRequestedRangeNotSatisfiable, "BLOB_UPLOAD_INVALID", fmt.Sprintf("range begins at %s, want %d", from, size))
		return
	}
	n, err := io.Copy(f, req.Body)
	if err != nil {
		if req.Method != http.MethodPatch {
			os.Remove(file)
		}
		failed(w, err)
		return
	}
	if digest := q.Get("digest"); req.Method == http.MethodPut || digest != "" {
		r.finish(w, file, repo, digest)
		return
	}
	w.Header().Set("Location", "/v2/"+repo+"/blobs/uploads/"+id)
	w.Header().Set("Range", fmt.Sprintf("0-%d", max(size+n-1, 0)))
	w.WriteHeader(http.StatusAccepted)
}

// finish gives an upload its name, if that is its digest.
func (r *Registry) finish(w http.ResponseWriter, file, repo, digest string) {
	defer os.Remove(file)
	m := digestQuery.FindStringSubmatch(digest)
	if m == nil {
		refuse(w, http.StatusBadRequest, "DIGEST_INVALID", digest)
		return
	}
	f, err := os.Open(file)
	if err != nil {
		failed(w, err)
		return
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		failed(w, err)
		return
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != m[1] {
		refuse(w, http.StatusBadRequest, "DIGEST_INVALID", "content has sha256:"+got)
		return
	}
	if err := os.Rename(file, r.path("blobs/sha256", m[1])); err != nil {
		failed(w, err)
		return
	}
	created(w, repo, m[1])
}

// manifest lets the registry in memory judge, and writes down what it accepted.
func (r *Registry) manifest(w http.ResponseWriter, req *http.Request, repo, target string) {
	body, err := io.ReadAll(http.MaxBytesReader(w, req.Body, maxManifest))
	if err != nil {
		refuse(w, http.StatusRequestEntityTooLarge, "SIZE_INVALID", err.Error())
		return
	}
	digest, _, err := v1.SHA256(bytes.NewReader(body))
	if err != nil {
		failed(w, err)
		return
	}
	put := req.Method == http.MethodPut
	if put && strings.HasPrefix(target, "sha256:") && target != digest.String() {
		refuse(w, http.StatusBadRequest, "DIGEST_INVALID", "content has "+digest.String())
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	dir := r.path("manifests", repo, "_")
	if put {
		var m struct{ MediaType string }
		if json.Unmarshal(body, &m) != nil {
			refuse(w, http.StatusBadRequest, "MANIFEST_INVALID", "not JSON")
			return
		}
		if req.Header.Get("Content-Type") == "" {
			req.Header.Set("Content-Type", m.MediaType)
		}
		if strings.ContainsAny(req.Header.Get("Content-Type"), "\r\n") {
			refuse(w, http.StatusBadRequest, "MANIFEST_INVALID", "media type")
			return
		}
	}
	req.Body = io.NopCloser(bytes.NewReader(body))
	answer := &statusWriter{ResponseWriter: w}
	r.manifests.ServeHTTP(answer, req)
	switch {
	case answer.status == http.StatusCreated:
		record := append([]byte(req.Header.Get("Content-Type")+"\n"), body...)
		err = errors.Join(os.MkdirAll(dir, 0o755), r.write(filepath.Join(dir, digest.String()), record), r.write(filepath.Join(dir, target), record))
	case answer.status == http.StatusAccepted:
		err = os.Remove(filepath.Join(dir, target))
	}
	if err != nil {
		log.Printf("registry: %v", err) // the answer is out; it holds until the process ends
	}
}

func (r *Registry) write(file string, b []byte) error {
	tmp := r.path("uploads", hex.EncodeToString([]byte(rand.Text())))
	if err := os.WriteFile(tmp, b, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, file)
}

func created(w http.ResponseWriter, repo, sum string) {
	w.Header().Set("Docker-Content-Digest", "sha256:"+sum)
	w.Header().Set("Location", "/v2/"+repo+"/blobs/sha256:"+sum)
	w.WriteHeader(http.StatusCreated)
}

func failed(w http.ResponseWriter, err error) {
	refuse(w, http.StatusInternalServerError, "UNKNOWN", err.Error())
}

func refuse(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	type e struct {
		Code    string `json:"code"`
		Message string `json:"message"`
	}
	json.NewEncoder(w).Encode(map[string][]e{"errors": {{code, message}}})
}

// noBlobs stands in for the blobs of the registry in memory, which is never asked for one.
type noBlobs struct{}

func (noBlobs) Get(context.Context, string, v1.Hash) (io.ReadCloser, error) {
	return nil, registry.ErrNotFound
}

// statusWriter notes status and size of an answer.
type statusWriter struct {
	http.ResponseWriter
	status int
	bytes  int64
}

func (w *statusWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	n, err := w.ResponseWriter.Write(b)
	w.bytes += int64(n)
	return n, err
}

// discard is the ResponseWriter of a request that nobody sent.
type discard struct {
	header http.Header
	status int
}

func (w *discard) Header() http.Header         { return w.header }
func (w *discard) Write(b []byte) (int, error) { return len(b), nil }
func (w *discard) WriteHeader(status int)      { w.status = status }

// Log returns h with a line in w for each request when it has been answered: time, method,
// path, Range header or "-", status, bytes of the body, milliseconds.
func Log(h http.Handler, w io.Writer) http.Handler {
	l := log.New(w, "", 0)
	return http.HandlerFunc(func(rw http.ResponseWriter, req *http.Request) {
		start := time.Now()
		path, ranges := req.URL.EscapedPath(), req.Header.Get("Range")
		if ranges == "" {
			ranges = "-"
		}
		sw := &statusWriter{ResponseWriter: rw}
		h.ServeHTTP(sw, req)
		l.Printf("%s %s %s %q %d %d %dms", start.UTC().Format(time.RFC3339Nano), req.Method, path, ranges, sw.status, sw.bytes, time.Since(start).Milliseconds())
	})
}
