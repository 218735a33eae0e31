package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/pkg/archive/compression"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// unpack writes layer i of an image to DIR/i, in the form and by the code in which containerd's
// overlayfs snapshotter has it: containerd's core/diff/apply calls archive.Apply with these options on
// the snapshot's upper directory. It prints the overlayfs option that puts the layers together.
func unpack(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("unpack", flag.ExitOnError)
	flags.Parse(args)
	if flags.NArg() != 2 {
		return errArguments
	}
	src, tag := splitTag(flags.Arg(0))
	dst, err := filepath.Abs(flags.Arg(1))
	if err != nil {
		return err
	}
	desc, err := src.target(tag)
	if err != nil {
		return err
	}
	manifest, err := src.manifest(desc)
	if err != nil {
		return err
	}
	var config ocispec.Image
	if err := src.read(manifest.Config.Digest, &config); err != nil {
		return err
	}
	if len(config.RootFS.DiffIDs) != len(manifest.Layers) {
		return fmt.Errorf("%d layers, %d diffIDs", len(manifest.Layers), len(config.RootFS.DiffIDs))
	}
	var parents []string // nearest first, as in lowerdir
	for i, l := range manifest.Layers {
		dir := filepath.Join(dst, strconv.Itoa(i))
		if err := prepare(dir, parents); err != nil {
			return err
		}
		diffID, err := apply(ctx, src.blob(l.Digest), dir, parents)
		if err != nil {
			return fmt.Errorf("layer %d, %s: %w", i, l.Digest, err)
		}
		if diffID != config.RootFS.DiffIDs[i] {
			return fmt.Errorf("layer %d, %s: the config says diffID %s, it is %s", i, l.Digest, config.RootFS.DiffIDs[i], diffID)
		}
		parents = slices.Insert(parents, 0, dir)
	}
	fmt.Println("lowerdir=" + strings.Join(parents, ":"))
	return nil
}

// prepare makes the upper directory of a snapshot, which takes its owner from its parent.
func prepare(dir string, parents []string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o755); err != nil || len(parents) == 0 {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(parents[0], &st); err != nil {
		return err
	}
	return os.Lchown(dir, int(st.Uid), int(st.Gid))
}

func apply(ctx context.Context, blob, dir string, parents []string) (digest.Digest, error) {
	f, err := os.Open(blob)
	if err != nil {
		return "", err
	}
	defer f.Close()
	tar, err := compression.DecompressStream(f)
	if err != nil {
		return "", err
	}
	defer tar.Close()
	diffID := digest.Canonical.Digester()
	r := io.TeeReader(tar, diffID.Hash())
	opts := []archive.ApplyOpt{archive.WithConvertWhiteout(archive.OverlayConvertWhiteout)}
	if len(parents) > 0 {
		opts = append(opts, archive.WithParents(parents))
	}
	if _, err := archive.Apply(ctx, dir, r, opts...); err != nil {
		return "", err
	}
	if _, err := io.Copy(io.Discard, r); err != nil {
		return "", err
	}
	return diffID.Digest(), nil
}
