package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/stargz-snapshotter/service"
	"github.com/containerd/stargz-snapshotter/service/resolver"
	"google.golang.org/grpc"
)

// stargzSnapshotter is stargz-snapshotter's service for containerd with its own defaults, listening on a socket
// until it is told to end; then it unmounts everything. It prints READY when it listens.
func stargzSnapshotter(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("stargz-snapshotter", flag.ExitOnError)
	plain := flags.String("plain-http", "", "the `host:port` of a registry that is spoken to without TLS")
	flags.Parse(args)
	if flags.NArg() != 2 {
		return errArguments
	}
	root, socket := flags.Arg(0), flags.Arg(1)
	if err := os.MkdirAll(root, 0o700); err != nil {
		return err
	}
	var config service.Config
	config.NoPrometheus = true // its registry is the program's, and nobody asks
	if *plain != "" {
		config.Host = map[string]resolver.HostConfig{*plain: {Mirrors: []resolver.MirrorConfig{{Host: *plain, Insecure: true}}}}
	}
	snapshotter, err := service.NewStargzSnapshotterService(ctx, root, &config)
	if err != nil {
		return err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	fmt.Println("READY")
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
		server.Stop()
		return errors.Join(<-served, snapshotter.Close())
	}
}
