package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"lazuli/cmd/lazuli/internal/daemon"
	"lazuli/fs/fetch"
	"lazuli/fs/remote"
	"lazuli/fs/rootfs"
)

// A host is who has the images: the daemon, if one runs, else this process.
type host interface {
	Images(ctx context.Context) ([]rootfs.Image, error)
	Remove(ctx context.Context, reference string) (freed int64, err error)
	Prune(ctx context.Context) (freed int64, err error)
	// mount mounts an image at an empty folder, or at one of the host's own if dir is "". tied says that the mount
	// must not outlive this process.
	mount(ctx context.Context, ref remote.Reference, dir string, rw, fill, tied bool, stderr io.Writer) (*mounted, error)
	Close() error
}

// A mounted is an image that is mounted.
type mounted struct {
	dir    string
	digest string
	config *v1.ConfigFile
	// When the manifest was here, when the tables of contents were, and when the root was usable.
	resolved, parsed, usable time.Time
	// wait returns when somebody has unmounted it, or ctx ends. It is nil if the daemon looks after that.
	wait  func(ctx context.Context) error
	stats func() (remote.Stats, fetch.Stats)
	close func() error // stats is of use until then, or from then on
}

// host returns who has the images.
func (a *app) host(stderr io.Writer) (host, error) {
	if client := a.client(); client != nil {
		return theDaemon{client, a}, nil
	}
	node, err := a.open(stderr)
	if err != nil {
		return nil, err
	}
	return thisProcess{node, a}, nil
}

// client returns a client of the daemon that has the root folder, or nil.
func (a *app) client() *daemon.Client {
	client := daemon.Dial(a.Socket)
	if client == nil {
		return nil
	}
	about, err := client.About(context.Background())
	if err != nil {
		return nil
	}
	root, err := filepath.EvalSymlinks(a.Root)
	if err != nil || root != about.Root {
		return nil
	}
	return client
}

// withHost calls f with who has the images.
func (a *app) withHost(stderr io.Writer, f func(host) error) (err error) {
	h, err := a.host(stderr)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.Close()) }()
	return f(h)
}

// thisProcess is the host where no daemon runs.
type thisProcess struct {
	*rootfs.Node
	a *app
}

func (p thisProcess) Images(context.Context) ([]rootfs.Image, error) { return p.Node.Images() }

func (p thisProcess) Remove(_ context.Context, reference string) (int64, error) {
	return p.Node.Remove(reference)
}

func (p thisProcess) Prune(context.Context) (int64, error) { return p.Node.Prune() }

func (p thisProcess) mount(ctx context.Context, ref remote.Reference, dir string, rw, fill, _ bool, stderr io.Writer) (*mounted, error) {
	c := count(stderr, fmt.Sprintf("%v: fetching whole layers", ref))
	defer c.stop()
	r, err := p.Node.Mount(ctx, ref, dir, rootfs.MountOptions{
		RW:       rw,
		Notice:   func(s string) { fmt.Fprintln(printable(stderr), s) },
		Progress: c.add,
	})
	if err != nil {
		return nil, err
	}
	stop := func() {}
	if fill {
		stop = fillBehind(ctx, r, p.a, stderr)
	}
	return &mounted{
		dir: r.Dir, digest: r.Image.Digest.String(), config: r.Config,
		resolved: r.Resolved, parsed: r.Parsed, usable: r.Mounted,
		wait:  r.Wait,
		stats: r.Stats,
		close: func() error { stop(); return r.Close() },
	}, nil
}

// theDaemon is the host where one runs.
type theDaemon struct {
	*daemon.Client
	a *app
}

func (d theDaemon) Close() error { return nil }

func (d theDaemon) mount(ctx context.Context, ref remote.Reference, dir string, rw, fill, tied bool, stderr io.Writer) (*mounted, error) {
	c := count(stderr, fmt.Sprintf("%v: fetching whole layers", ref))
	defer c.stop()
	ref, err := ref.Abs()
	if err != nil {
		return nil, err
	}
	q := daemon.MountRequest{Reference: ref.String(), RW: rw, Fill: fill}
	if dir != "" {
		if q.Dir, err = filepath.Abs(dir); err != nil {
			return nil, err
		}
	}
	if tied {
		q.PID = os.Getpid()
	}
	if name := ref.Name(); name != nil {
		// The daemon does not know who calls it, so it gets the caller's credentials for this one registry.
		auth, err := authn.Resolve(ctx, authn.DefaultKeychain, name.Context())
		if err == nil && auth != authn.Anonymous {
			if q.Auth, err = authn.Authorization(ctx, auth); err != nil {
				return nil, fmt.Errorf("credentials for %s: %w", name.Context().RegistryStr(), err)
			}
		}
	}
	m, err := d.Client.Mount(ctx, q, func(s string) { fmt.Fprintln(printable(stderr), s) }, c.add)
	if err != nil {
		return nil, err
	}
	var ended daemon.Ended
	return &mounted{
		dir: m.Dir, digest: m.Digest, config: m.Config, resolved: m.Resolved, parsed: m.Parsed, usable: m.Mounted,
		stats: func() (remote.Stats, fetch.Stats) { return ended.Network, ended.Fetched },
		close: func() (err error) {
			ended, err = d.Client.Unmount(context.WithoutCancel(ctx), m.ID)
			return err
		},
	}, nil
}
