package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/fs"
	"github.com/containerd/stargz-snapshotter/fs/config"
	"github.com/containerd/stargz-snapshotter/fs/layer"
	"github.com/containerd/stargz-snapshotter/fs/source"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// digestLabel tells getSources which layer is meant.
const digestLabel = "layer"

// stargzMount mounts each layer of an image in a registry with stargz-snapshotter's file system and puts
// overlayfs on top, as its snapshotter does for a view. It prints READY and serves until it is
// told to end; then it unmounts everything. Registries on this machine are spoken to in plain HTTP.
func stargzMount(ctx context.Context, args []string) (err error) {
	flags := flag.NewFlagSet("stargz-mount", flag.ExitOnError)
	background := flags.Bool("background", false, "fetch everything in the background, as the snapshotter does by default")
	prefetch := flags.Bool("prefetch", false, "prefetch up to the landmark, as the snapshotter does by default")
	flags.Parse(args)
	if flags.NArg() != 2 {
		return errArguments
	}
	ref, target := flags.Arg(0), flags.Arg(1)
	spec, err := reference.Parse(ref)
	if err != nil {
		return err
	}
	hosts := docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost))
	layers, err := resolve(ctx, ref, hosts)
	if err != nil {
		return err
	}

	state, err := os.MkdirTemp("", "stargz-mount")
	if err != nil {
		return err
	}
	defer os.RemoveAll(state)
	cfg := config.Config{
		NoBackgroundFetch:   !*background,
		NoPrefetch:          !*prefetch,
		NoPrometheus:        true,
		AllowNoVerification: true, // legacy stargz has no TOC digest
	}
	getSources := func(labels map[string]string) ([]source.Source, error) {
		for _, l := range layers {
			if l.Digest.String() == labels[digestLabel] {
				return []source.Source{{
					Hosts:    func(s reference.Spec) ([]docker.RegistryHost, error) { return hosts(s.Hostname()) },
					Name:     spec,
					Target:   l,
					Manifest: ocispec.Manifest{Layers: layers},
				}}, nil
			}
		}
		return nil, fmt.Errorf("no layer %s", labels[digestLabel])
	}
	filesystem, err := fs.NewFilesystem(filepath.Join(state, "cache"), cfg, fs.WithGetSources(getSources),
		fs.WithOverlayOpaqueType(layer.OverlayOpaqueTrusted))
	if err != nil {
		return err
	}

	var lower []string // nearest first
	defer func() {
		for _, dir := range lower {
			err = errors.Join(err, filesystem.Unmount(context.WithoutCancel(ctx), dir))
		}
	}()
	for i, l := range layers {
		dir := filepath.Join(state, strconv.Itoa(i))
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
		labels := map[string]string{digestLabel: l.Digest.String()}
		if toc := l.Annotations[estargz.TOCJSONDigestAnnotation]; toc != "" {
			labels[estargz.TOCJSONDigestAnnotation] = toc
		} else {
			labels[config.TargetSkipVerifyLabel] = "true"
		}
		if err := filesystem.Mount(ctx, dir, labels); err != nil {
			return fmt.Errorf("layer %d, %s: %w", i, l.Digest, err)
		}
		lower = append([]string{dir}, lower...)
	}
	if err := overlay(target, lower, state); err != nil {
		return err
	}
	fmt.Println("READY")
	<-ctx.Done()
	return unmount(target)
}

// overlay mounts lower read-only at target. overlayfs wants two lower directories for
// that, so an empty one is put below.
func overlay(target string, lower []string, state string) error {
	empty := filepath.Join(state, "empty")
	if err := os.Mkdir(empty, 0o755); err != nil {
		return err
	}
	fd, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("fsopen overlay: %w", err)
	}
	defer unix.Close(fd)
	for _, dir := range append(lower[:len(lower):len(lower)], empty) {
		if err := unix.FsconfigSetString(fd, "lowerdir+", dir); err != nil {
			return fmt.Errorf("overlay lowerdir %s: %w", dir, err)
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return fmt.Errorf("overlay: %w", err)
	}
	m, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return fmt.Errorf("fsmount overlay: %w", err)
	}
	defer unix.Close(m)
	if err := unix.MoveMount(m, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount at %s: %w", target, err)
	}
	return nil
}

// unmount waits for nothing: what is still open in target keeps its files until it is closed.
func unmount(target string) error {
	if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", target, err)
	}
	return nil
}

// resolve returns the layers of the image at ref, lowest first.
func resolve(ctx context.Context, ref string, hosts docker.RegistryHosts) ([]ocispec.Descriptor, error) {
	resolver := docker.NewResolver(docker.ResolverOptions{Hosts: hosts})
	name, desc, err := resolver.Resolve(ctx, ref)
	if err != nil {
		return nil, err
	}
	fetcher, err := resolver.Fetcher(ctx, name)
	if err != nil {
		return nil, err
	}
	for images.IsIndexType(desc.MediaType) {
		var index ocispec.Index
		if err := fetchJSON(ctx, fetcher, desc, &index); err != nil {
			return nil, err
		}
		if len(index.Manifests) == 0 {
			return nil, fmt.Errorf("index %s is empty", desc.Digest)
		}
		desc = index.Manifests[0]
	}
	var manifest ocispec.Manifest
	if err := fetchJSON(ctx, fetcher, desc, &manifest); err != nil {
		return nil, err
	}
	return manifest.Layers, nil
}

func fetchJSON(ctx context.Context, fetcher remotes.Fetcher, desc ocispec.Descriptor, v any) error {
	r, err := fetcher.Fetch(ctx, desc)
	if err != nil {
		return err
	}
	defer r.Close()
	b, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}
