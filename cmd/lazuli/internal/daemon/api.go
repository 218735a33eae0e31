package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"net/http/pprof"
	"os"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"lazuli/fs/fetch"
	"lazuli/fs/remote"
	"lazuli/fs/rootfs"
	"lazuli/snapshotter"
)

// A Status says what a daemon does.
type Status struct {
	About
	Store    StoreStatus            `json:"store"`
	Images   []rootfs.Image         `json:"images"`
	Mounts   []MountStatus          `json:"mounts"`    // of users
	Snapshot []snapshotter.Mounted  `json:"snapshots"` // containerd's, that are mounted
	Fetching []fetch.Under          `json:"fetching"`
	Fetched  fetch.Stats            `json:"fetched"` // since the server began
	Bad      []snapshotter.Bad      `json:"bad"`
	Fallback []snapshotter.Fallback `json:"notLazy"` // layers that containerd was left to unpack, the last ones
}

// An About says which daemon it is.
type About struct {
	Version string    `json:"version"`
	Root    string    `json:"root"`
	Server  int       `json:"serverPID"`
	Keeper  int       `json:"keeperPID"`
	Since   time.Time `json:"since"` // when the server began
}

// A StoreStatus says how large the store is.
type StoreStatus struct {
	Size  int64 `json:"size"`  // of its objects, in bytes of disk
	Limit int64 `json:"limit"` // what Size may grow to, but for what is in use
}

// A MountStatus is an image that a user mounted.
type MountStatus struct {
	ID        string `json:"id"`
	Reference string `json:"reference"`
	Dir       string `json:"dir"`
	PID       int    `json:"pid,omitempty"` // of the process that it ends with
}

// A MountRequest asks for a mount.
type MountRequest struct {
	Reference string            `json:"reference"`
	Dir       string            `json:"dir,omitempty"` // an empty folder; "" is one of the daemon's own
	RW        bool              `json:"rw,omitempty"`
	Fill      bool              `json:"fill,omitempty"`
	Auth      *authn.AuthConfig `json:"auth,omitempty"` // the caller's credentials for the registry
	PID       int               `json:"pid,omitempty"`  // a process with which the mount ends; 0 is none
}

// A MountEvent is a line of the answer to a MountRequest.
type MountEvent struct {
	Notice  string   `json:"notice,omitempty"`
	Fetched int64    `json:"fetched,omitempty"` // bytes more, of layers that come whole
	Error   string   `json:"error,omitempty"`
	Mounted *Mounted `json:"mounted,omitempty"` // the last line, if there is no error
}

// A Mounted is what a mount is.
type Mounted struct {
	ID       string         `json:"id"`
	Dir      string         `json:"dir"`
	Digest   string         `json:"digest"`
	Config   *v1.ConfigFile `json:"config"`
	Resolved time.Time      `json:"resolved"`
	Parsed   time.Time      `json:"parsed"`
	Mounted  time.Time      `json:"mounted"`
}

// An Ended is what a mount asked of the network.
type Ended struct {
	Network remote.Stats `json:"network"`
	Fetched fetch.Stats  `json:"fetched"` // by the daemon, since the mount began
}

// A Freed says how much disk became free.
type Freed struct {
	Bytes int64 `json:"bytes"`
}

func (s *server) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) { answer(w)(s.status()) })
	mux.HandleFunc("GET /v1/about", func(w http.ResponseWriter, r *http.Request) { answer(w)(s.about(), nil) })
	mux.HandleFunc("GET /v1/images", func(w http.ResponseWriter, r *http.Request) { answer(w)(s.node.Images()) })
	mux.HandleFunc("DELETE /v1/images", func(w http.ResponseWriter, r *http.Request) { answer(w)(s.remove(r.FormValue("reference"))) })
	mux.HandleFunc("POST /v1/prune", func(w http.ResponseWriter, r *http.Request) { answer(w)(freed(s.node.Prune())) })
	mux.HandleFunc("POST /v1/verify", func(w http.ResponseWriter, r *http.Request) {
		answer(w)(struct{}{}, s.sn.Verify(r.Context(), true))
	})
	mux.HandleFunc("POST /v1/mounts", s.mount)
	mux.HandleFunc("DELETE /v1/mounts/{id}", func(w http.ResponseWriter, r *http.Request) { answer(w)(s.unmount(r.PathValue("id"))) })
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.Handle("/", s.openHandler())
	return mux
}

// openHandler is what anybody may ask who reaches the address for metrics.
func (s *server) openHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", s.metrics.handler())
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		if _, err := s.node.ServerDevice(); err != nil {
			http.Error(w, "the object server does not answer: "+err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.Write([]byte("ok\n"))
	})
	return mux
}

// answer writes a value as JSON, or an error as {"error": …} with status 500.
func answer(w http.ResponseWriter) func(v any, err error) {
	return func(v any, err error) {
		w.Header().Set("Content-Type", "application/json")
		if err != nil {
			w.WriteHeader(http.StatusInternalServerError)
			v = MountEvent{Error: err.Error()}
		}
		json.NewEncoder(w).Encode(v)
	}
}

func freed(n int64, err error) (Freed, error) { return Freed{n}, err }

func (s *server) remove(reference string) (Freed, error) { return freed(s.node.Remove(reference)) }

func (s *server) mount(w http.ResponseWriter, r *http.Request) {
	var q MountRequest
	if err := json.NewDecoder(r.Body).Decode(&q); err != nil {
		answer(w)(nil, err)
		return
	}
	ref, err := remote.ParseReference(q.Reference)
	if err == nil && q.Auth != nil && ref.Kind() == remote.Registry {
		err = s.keychain.Remember(ref.Name().String(), *q.Auth)
	}
	o := owner{PID: q.PID}
	if err == nil && o.PID != 0 {
		o.Start, err = start(o.PID)
	}
	if err != nil {
		answer(w)(nil, err)
		return
	}
	events := make(chan MountEvent)
	ctx := r.Context()
	done := make(chan struct{})
	go func() {
		defer close(done)
		lines := json.NewEncoder(w)
		flush := http.NewResponseController(w)
		for e := range events {
			lines.Encode(e)
			flush.Flush()
		}
	}()
	x, err := s.mounts.mount(ctx, s, ref, q.Dir, o, q.Fill, rootfs.MountOptions{
		RW:       q.RW,
		Notice:   func(line string) { events <- MountEvent{Notice: line} },
		Progress: func(n int64) { events <- MountEvent{Fetched: n} },
	})
	if err != nil {
		events <- MountEvent{Error: err.Error()}
	} else {
		events <- MountEvent{Mounted: &Mounted{
			ID: x.id, Dir: x.Dir, Digest: x.Image.Digest.String(), Config: x.Config,
			Resolved: x.Resolved, Parsed: x.Parsed, Mounted: x.Rootfs.Mounted,
		}}
	}
	close(events)
	<-done
	if err == nil && ctx.Err() != nil { // nobody has heard of it
		s.mounts.unmount(x.id)
	}
}

func (s *server) unmount(id string) (Ended, error) {
	var e Ended
	for _, x := range s.mounts.list() {
		if x.id == id {
			e.Network, e.Fetched = x.Stats()
			e.Fetched = e.Fetched.Since(x.before)
		}
	}
	return e, s.mounts.unmount(id)
}

func (s *server) about() About {
	return About{s.o.Version, s.node.Root(), os.Getpid(), os.Getppid(), s.begun}
}

func (s *server) status() (Status, error) {
	st := Status{About: s.about(), Fetching: s.node.Under(), Fetched: s.node.QueueStats()}
	var errs []error
	var err error
	if st.Store.Size, err = s.node.Size(); err != nil {
		errs = append(errs, err)
	}
	st.Store.Limit = s.limit()
	if st.Images, err = s.node.Images(); err != nil {
		errs = append(errs, err)
	}
	for _, x := range s.mounts.list() {
		st.Mounts = append(st.Mounts, MountStatus{x.id, x.Reference(), x.Dir, x.owner.PID})
	}
	if st.Snapshot, st.Bad, err = s.sn.Status(context.Background()); err != nil {
		errs = append(errs, err)
	}
	st.Fallback = s.sn.Fallbacks()
	return st, errors.Join(errs...)
}
