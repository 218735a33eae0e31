package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
)

// rebuild makes the next build of an image: its largest layer is another one, in which as many files as are 2 % of the image's have
// another content. Which ones is a matter of their paths' hashes. The job works with them as with those that were.
func rebuild(_ context.Context, _ *world, im image, dst string) error {
	img, err := openLayout(im.Dir)
	if err != nil {
		return err
	}
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	m, err := img.Manifest()
	if err != nil {
		return err
	}
	largest, total := 0, 0
	var names []string // in the largest layer
	for i, l := range m.Layers {
		if l.Size > m.Layers[largest].Size {
			largest = i
		}
	}
	for i, l := range layers {
		err := entries(l, func(h *tar.Header, _ io.Reader) error {
			if h.Typeflag == tar.TypeReg && h.Size > 0 {
				total++
				if i == largest {
					names = append(names, h.Name)
				}
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	byHash(names)
	changed := map[string]bool{}
	for _, n := range names[:min(len(names), total/50)] {
		changed[n] = true
	}
	file := dst + ".layer"
	defer os.Remove(file)
	if err := writeLayer(file, layers[largest], changed); err != nil {
		return err
	}
	if layers[largest], err = tarball.LayerFromFile(file, tarball.WithMediaType(types.OCILayer)); err != nil {
		return err
	}
	return writeRebuilt(dst, img, layers)
}

// byHash sorts names by their hashes.
func byHash(names []string) {
	slices.SortFunc(names, func(a, b string) int {
		x, y := sha256.Sum256([]byte(a)), sha256.Sum256([]byte(b))
		return cmp.Or(bytes.Compare(x[:], y[:]), cmp.Compare(a, b))
	})
}

// entries calls f with each entry of a layer.
func entries(l v1.Layer, f func(*tar.Header, io.Reader) error) error {
	r, err := l.Uncompressed()
	if err != nil {
		return err
	}
	defer r.Close()
	for t := tar.NewReader(r); ; {
		h, err := t.Next()
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = f(h, t)
		}
		if err != nil {
			return err
		}
	}
}

// writeLayer writes a layer with some files changed.
func writeLayer(file string, l v1.Layer, changed map[string]bool) error {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer f.Close()
	zip := gzip.NewWriter(f)
	to := tar.NewWriter(zip)
	err = entries(l, func(h *tar.Header, r io.Reader) error {
		h.Format = tar.FormatPAX
		if changed[h.Name] {
			b, err := io.ReadAll(r)
			if err != nil {
				return err
			}
			b = change(h.Name, b)
			h.Size, r = int64(len(b)), bytes.NewReader(b)
		}
		if err := to.WriteHeader(h); err != nil {
			return fmt.Errorf("%s: %w", h.Name, err)
		}
		_, err := io.Copy(to, r)
		return err
	})
	return errors.Join(err, to.Close(), zip.Close(), f.Close())
}

// change returns another content that means the same: programs, libraries, compiled Python and texts may have a line end more. Python
// compares the size of a source with what the compiled file says: there it is a space instead of the last line's end.
func change(name string, b []byte) []byte {
	if strings.HasSuffix(name, ".py") && b[len(b)-1] == '\n' {
		b[len(b)-1] = ' '
		return b
	}
	return append(b, '\n')
}

func writeRebuilt(dst string, img v1.Image, layers []v1.Layer) error {
	config, err := img.ConfigFile()
	if err != nil {
		return err
	}
	config = config.DeepCopy()
	for i, l := range layers {
		if config.RootFS.DiffIDs[i], err = l.DiffID(); err != nil {
			return err
		}
	}
	out, err := mutate.AppendLayers(mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON), layers...)
	if err != nil {
		return err
	}
	if out, err = mutate.ConfigFile(out, config); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(dst), 0o755); err != nil {
		return err
	}
	to, err := layout.Write(dst, empty.Index)
	if err != nil {
		return err
	}
	return to.AppendImage(out)
}
