// Command peers is what other container runtimes do with an image, so that
// Lazuli's tests have somebody to be compared with:
//
//	peers unpack LAYOUT[:TAG] DIR                  the layers as containerd's overlayfs snapshotter unpacks them
//	peers stargz-convert [options] SRC DST         an OCI layout made lazy by stargz-snapshotter's converter
//	peers stargz-mount [options] REF DIR           an image lazily mounted by stargz-snapshotter's file system
//	peers stargz-snapshotter [options] ROOT SOCKET stargz-snapshotter's service for containerd
//
// It is a module of its own because containerd and stargz-snapshotter bring some hundred modules that
// nothing else here needs. Nothing of Lazuli is imported, so that nothing of it can be on both sides of a comparison.
package main

import (
	"context"
	"errors"
	"fmt"
	"log"
	"os"
	"os/signal"

	"golang.org/x/sys/unix"
)

var verbs = map[string]func(context.Context, []string) error{
	"unpack":             unpack,
	"stargz-convert":     stargzConvert,
	"stargz-mount":       stargzMount,
	"stargz-snapshotter": stargzSnapshotter,
}

func main() {
	log.SetFlags(0)
	if len(os.Args) < 2 || verbs[os.Args[1]] == nil {
		fmt.Fprintln(os.Stderr, "usage: peers unpack|stargz-convert|stargz-mount|stargz-snapshotter [options] SRC DST")
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	err := verbs[os.Args[1]](ctx, os.Args[2:])
	stop()
	if err != nil {
		log.Fatalf("peers %s: %v", os.Args[1], err)
	}
}

var errArguments = errors.New("want two arguments, a source and a destination")
