package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/images/converter"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/containerd/platforms"
	"github.com/containerd/stargz-snapshotter/estargz"
	esgzconvert "github.com/containerd/stargz-snapshotter/nativeconverter/estargz"
	zstdconvert "github.com/containerd/stargz-snapshotter/nativeconverter/zstdchunked"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
)

// stargzConvert writes the image of one OCI layout to a new one, converted as "ctr-remote image convert"
// does it: the same library calls with the same defaults, on a local content store. The store's folder becomes the
// layout. It prints wall and CPU seconds, peak memory and the sizes of the layers before and after.
func stargzConvert(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("stargz-convert", flag.ExitOnError)
	zstdChunked := flags.Bool("zstdchunked", false, "zstd:chunked instead of eStargz")
	level := flags.Int("level", gzip.BestCompression, "gzip level")
	chunk := flags.Int("chunk-size", 0, "`bytes` of a chunk; 0: the library's 4 MiB")
	prioritized := flags.String("prioritized", "", "a `FILE` with a path in each line: these lie first in their layers and are prefetched, as by stargz-snapshotter's optimizer (eStargz)")
	group := flags.Int("min-chunk-size", 0, "put files together until a member has this many `bytes`; 0: a member for each file")
	flags.Parse(args)
	if flags.NArg() != 2 {
		return errArguments
	}
	src, tag := splitTag(flags.Arg(0))
	dst := layout(flags.Arg(1))
	desc, err := src.target(tag)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(string(dst), 0o755); err != nil {
		return err
	}
	store, err := local.NewLabeledStore(string(dst), &memoryLabels{m: map[digest.Digest]map[string]string{}})
	if err != nil {
		return err
	}
	if err := copyIn(ctx, store, src, desc); err != nil {
		return err
	}

	opts := []estargz.Option{estargz.WithChunkSize(*chunk), estargz.WithMinChunkSize(*group)}
	var layers converter.ConvertFunc
	if *zstdChunked {
		layers = zstdconvert.LayerConvertFuncWithCompressionLevel(zstd.SpeedDefault, opts...)
	} else {
		perLayer, err := prioritize(src, desc, *prioritized)
		if err != nil {
			return err
		}
		layers = esgzconvert.LayerConvertWithLayerAndCommonOptsFunc(perLayer, append(opts, estargz.WithCompressionLevel(*level))...)
	}
	start := time.Now()
	converted, err := converter.DefaultIndexConvertFunc(layers, true, platforms.All)(ctx, store, desc)
	if err != nil {
		return err
	}
	if converted == nil {
		converted = &desc
	}
	wall := time.Since(start)
	var used unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &used); err != nil {
		return err
	}

	before, err := layerBytes(src, desc)
	if err != nil {
		return err
	}
	after, err := layerBytes(dst, *converted)
	if err != nil {
		return err
	}
	if err := dst.writeIndex(*converted); err != nil {
		return err
	}
	if err := dropUnused(ctx, store, *converted); err != nil {
		return err
	}
	if err := os.RemoveAll(filepath.Join(string(dst), "ingest")); err != nil {
		return err
	}
	cpu := time.Duration(used.Utime.Nano() + used.Stime.Nano())
	fmt.Printf("wall=%.3f cpu=%.3f maxrss=%d before=%d after=%d\n",
		wall.Seconds(), cpu.Seconds(), used.Maxrss*1024, before, after)
	return nil
}

// prioritize returns the options by which each layer begins with those files of a list that it has; nil if file is "".
func prioritize(src layout, desc ocispec.Descriptor, file string) (map[digest.Digest][]estargz.Option, error) {
	if file == "" {
		return nil, nil
	}
	list, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	paths := strings.Split(strings.TrimSpace(string(list)), "\n")
	m, err := src.manifest(desc)
	opts := map[digest.Digest][]estargz.Option{}
	for _, l := range m.Layers {
		// Layers are converted side by side, so each has its own list of what it does not have.
		opts[l.Digest] = []estargz.Option{estargz.WithPrioritizedFiles(paths), estargz.WithAllowPrioritizeNotFound(new([]string))}
	}
	return opts, err
}

func layerBytes(l layout, desc ocispec.Descriptor) (n int64, err error) {
	m, err := l.manifest(desc)
	for _, layer := range m.Layers {
		n += layer.Size
	}
	return n, err
}

// copyIn brings desc and everything below it into the store.
func copyIn(ctx context.Context, store content.Store, src layout, desc ocispec.Descriptor) error {
	copyBlob := images.HandlerFunc(func(ctx context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		f, err := os.Open(src.blob(d.Digest))
		if err != nil {
			return nil, err
		}
		defer f.Close()
		return nil, content.WriteBlob(ctx, store, d.Digest.String(), f, d)
	})
	return images.Walk(ctx, images.Handlers(copyBlob, images.ChildrenHandler(store)), desc)
}

// dropUnused removes every blob that desc does not lead to.
func dropUnused(ctx context.Context, store content.Store, desc ocispec.Descriptor) error {
	used := map[digest.Digest]bool{}
	mark := images.HandlerFunc(func(_ context.Context, d ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		used[d.Digest] = true
		return nil, nil
	})
	if err := images.Walk(ctx, images.Handlers(mark, images.ChildrenHandler(store)), desc); err != nil {
		return err
	}
	var unused []digest.Digest
	err := store.Walk(ctx, func(i content.Info) error {
		if !used[i.Digest] {
			unused = append(unused, i.Digest)
		}
		return nil
	})
	for _, d := range unused {
		if err == nil {
			err = store.Delete(ctx, d)
		}
	}
	return err
}

// memoryLabels keeps a content store's labels. The converter passes diffIDs in them: without,
// it would inflate each layer once more.
type memoryLabels struct {
	mu sync.Mutex
	m  map[digest.Digest]map[string]string
}

func (l *memoryLabels) Get(d digest.Digest) (map[string]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return copyLabels(l.m[d]), nil
}

func (l *memoryLabels) Set(d digest.Digest, labels map[string]string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.m[d] = copyLabels(labels)
	return nil
}

func (l *memoryLabels) Update(d digest.Digest, update map[string]string) (map[string]string, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	labels := copyLabels(l.m[d])
	for k, v := range update {
		if v == "" {
			delete(labels, k)
		} else {
			labels[k] = v
		}
	}
	l.m[d] = labels
	return copyLabels(labels), nil
}

func copyLabels(m map[string]string) map[string]string {
	c := make(map[string]string, len(m))
	for k, v := range m {
		c[k] = v
	}
	return c
}
