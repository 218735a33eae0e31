// Package daemon is the server behind `lazuli daemon`: it puts the node's store, containerd's snapshots service, the CRI image
// proxy and an interface over HTTP together, and is the client of that interface too.
//
// It is a child of the keeper (package keeper), which holds what must outlive it: the sockets and the FUSE connection. So it can be
// killed at any time: the next one goes on where it was.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"sync/atomic"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"lazuli/cmd/lazuli/internal/keeper"
	"lazuli/fs/remote"
	"lazuli/fs/rootfs"
	"lazuli/snapshotter"
	"lazuli/snapshotter/credentials"
)

// Options configures a daemon. All but Root has a zero value that is the recommendation.
type Options struct {
	Root        string
	ReadTimeout time.Duration // how long a read waits for the network; zero is a minute
	Hosts       string        // containerd's directory of registry hosts; "" is none
	MaxSize     int64         // of the store's objects, in bytes; zero is a fifth of its file system
	Unverified  bool          // leave diffIDs unverified
	Unlearned   bool          // learn nothing from starts
	Share       bool          // put startup packs of what was learned beside the images
	Fill        rootfs.FillPolicy
	Containerd  string // containerd's socket, for the CRI image proxy
	Metrics     string // TCP address for metrics and /healthz; "" is none
	Version     string
	Logger      *slog.Logger // nil is silent
}

// A server is a daemon that runs.
type server struct {
	o        Options
	log      *slog.Logger
	begun    time.Time
	node     *rootfs.Node
	sn       *snapshotter.Snapshotter
	keychain *credentials.Keychain
	mounts   mounts
	metrics  *metrics
	full     atomic.Bool // the store is as large as it may be
}

// ErrOpen says that the root folder cannot be used.
var ErrOpen = errors.New("the daemon's root folder")

// Serve is a server's life: it ends when ctx does, or when it cannot go on.
func Serve(ctx context.Context, child *keeper.Child, o Options) error {
	s := &server{o: o, log: o.Logger, begun: time.Now()}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	s.metrics = newMetrics(s)
	nodeOptions := rootfs.Options{
		Logger: o.Logger, ReadTimeout: o.ReadTimeout, Hosts: o.Hosts, Daemon: true,
		Keychain: keychain{&s.keychain}, Unlearned: o.Unlearned,
		Fill: o.Fill, Room: func() bool { return !s.full.Load() },
	}
	share := &sharer{
		remote: remote.Options{Keychain: nodeOptions.Keychain, Hosts: o.Hosts, Logger: s.log}, log: s.log, last: map[v1.Hash]time.Time{},
	}
	if o.Share {
		nodeOptions.Learned = share.learned
	}
	var err error
	if s.node, err = rootfs.Open(o.Root, nodeOptions); err != nil {
		return fmt.Errorf("%w: %w", ErrOpen, err)
	}
	share.node = s.node // nothing can have started yet
	if s.keychain, err = credentials.Open(filepath.Join(s.node.Root(), "credentials"), o.Logger); err != nil {
		return fmt.Errorf("%w: %w", ErrOpen, err)
	}
	if s.sn, err = snapshotter.Open(s.node, snapshotter.Options{Logger: o.Logger, Unverified: o.Unverified}); err != nil {
		return fmt.Errorf("%w: %w", ErrOpen, err)
	}
	if err := s.mounts.adopt(s); err != nil {
		return err
	}
	fd, init, ok := child.FUSE()
	if !ok {
		fd = -1
	}
	connection, resumed, err := s.node.Serve(fd, init)
	if err != nil {
		return err
	}
	if !resumed {
		if err := child.Keep(connection.File(), connection.Init()); err != nil {
			return err
		}
	}
	unmounted := make(chan error, 1)
	go func() { unmounted <- connection.Wait() }() // ends with the process

	stop, err := s.listen(child)
	if err != nil {
		return err
	}
	work, cancel := context.WithCancel(ctx)
	defer cancel()
	go s.boundLoop(work)
	if err := child.Ready(); err != nil {
		return err
	}
	s.log.Info("serving", "root", s.node.Root(), "version", o.Version, "resumed", resumed)
	select {
	case <-ctx.Done():
		err = nil
	case err = <-unmounted:
		err = errors.Join(errors.New("the object server was unmounted"), err)
	}
	// Reads that wait are left for the next server: it is asked again for what this one has not answered.
	stop()
	return errors.Join(err, s.sn.Close())
}

// listen serves on the sockets that the keeper made, and returns what ends that.
func (s *server) listen(child *keeper.Child) (stop func(), err error) {
	grpcListener, err := child.Listener("grpc")
	if err != nil {
		return nil, err
	}
	apiListener, err := child.Listener("api")
	if err != nil {
		return nil, err
	}
	proxy, err := s.keychain.Proxy(s.o.Containerd)
	if err != nil {
		return nil, err
	}
	calls := grpc.NewServer(append(proxy.ServerOptions(), grpc.ChainUnaryInterceptor(s.metrics.call))...)
	snapshotsapi.RegisterSnapshotsServer(calls, snapshotservice.FromSnapshotter(s.sn))
	api := &http.Server{Handler: s.handler(), ReadHeaderTimeout: time.Minute}
	go calls.Serve(grpcListener) // ends with stop
	go api.Serve(apiListener)
	var open *http.Server
	if s.o.Metrics != "" {
		l, err := net.Listen("tcp", s.o.Metrics)
		if err != nil { // the node's main job does not need it
			s.log.Error("metrics", "err", err)
		} else {
			open = &http.Server{Handler: s.openHandler(), ReadHeaderTimeout: 10 * time.Second}
			go open.Serve(l)
		}
	}
	return func() {
		done := make(chan struct{})
		go func() { calls.GracefulStop(); close(done) }()
		// Calls that wait for a registry are asked again by who made them.
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
		defer cancel()
		select {
		case <-done:
		case <-ctx.Done():
			calls.Stop()
		}
		api.Shutdown(ctx)
		proxy.Close()
		if open != nil {
			open.Close()
		}
	}, nil
}

// Limit is how many bytes of disk the store's objects may take.
func (s *server) limit() int64 {
	if s.o.MaxSize > 0 {
		return s.o.MaxSize
	}
	var st unix.Statfs_t
	if err := unix.Statfs(s.node.Root(), &st); err != nil {
		return 1 << 62
	}
	return int64(st.Blocks) * st.Bsize / 5
}

// boundEvery is how often the store is compared with its limit, and credentials with the images that there are.
const boundEvery = time.Minute

func (s *server) boundLoop(ctx context.Context) {
	tick := time.NewTicker(boundEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		limit := s.limit()
		freed, left, err := s.node.Bound(limit)
		s.full.Store(left >= limit)
		switch {
		case err != nil:
			s.log.Warn("the store cannot be kept in bounds", "err", err)
		case left > limit:
			s.log.Warn("the store is larger than max_size, and all of it is in use", "size", left, "max_size", limit)
		case freed > 0:
			s.log.Info("the store was larger than max_size", "removed", freed, "size", left)
		}
		if names, err := s.node.Repositories(); err == nil {
			err = s.keychain.Forget(func(repository string) bool { return names[repository] })
			if err != nil {
				s.log.Warn("credentials of images that are gone", "err", err)
			}
		}
	}
}

// Sockets returns the paths of the daemon's sockets, by their names for the keeper.
func Sockets(socket string) map[string]string {
	return map[string]string{"grpc": socket, "api": APISocket(socket)}
}

// APISocket is the path of the interface over HTTP: beside the one for containerd.
func APISocket(socket string) string { return filepath.Join(filepath.Dir(socket), "api.sock") }

// Holder is the path of the socket where a keeper that was stopped leaves the FUSE connection.
func Holder(socket string) string { return filepath.Join(filepath.Dir(socket), "keeper.sock") }
