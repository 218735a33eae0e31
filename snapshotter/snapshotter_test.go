package snapshotter

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"

	"lazuli/fs/rootfs"
)

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("LAZULI_CI") != "" {
		t.Fatal("needs root")
	}
	t.Skip("needs root")
}

// open returns the snapshotter of a node with its root folder at root, and what takes both down.
func open(ctx context.Context, root string, o Options) (*Snapshotter, *rootfs.Node, func() error, error) {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	node, err := rootfs.Open(root, rootfs.Options{Daemon: true, Logger: log})
	if err != nil {
		return nil, nil, nil, err
	}
	if o.Logger == nil {
		o.Logger = log
	}
	s, err := Open(node, o)
	if err != nil {
		return nil, nil, nil, errors.Join(err, node.Close())
	}
	if _, _, err := node.Serve(-1, nil); err != nil {
		return nil, nil, nil, errors.Join(err, s.Close(), node.Close())
	}
	return s, node, func() error {
		err := errors.Join(s.Close(), node.Close())
		_, terr := rootfs.Teardown(root)
		return errors.Join(err, terr)
	}, nil
}

// TestSuite is containerd's own.
func TestSuite(t *testing.T) {
	needRoot(t)
	testsuite.SnapshotterSuite(t, "lazuli", func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		s, _, closed, err := open(t.Context(), root, Options{})
		return s, closed, err
	})
}
