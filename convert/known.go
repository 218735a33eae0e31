package convert

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"archive/tar"

	"lazuli/fs/remote"
	"lazuli/fs/toc"
)

// A record is what is remembered of one conversion of one layer: a file in the
// cache, named by the source layer and the options. Records are hints: a blob that one
// names is used only if it is found.
type record struct {
	Source  v1.Hash       `json:"source"`
	Options string        `json:"options"`
	Target  v1.Descriptor `json:"target"`
	DiffID  v1.Hash       `json:"diffID"`
	// Places are where the blob was put, the latest first.
	Places []string `json:"places"`
}

const maxPlaces = 16

func (c *conversion) recordName(source v1.Hash, options string) string {
	h := sha256.Sum256([]byte(source.String() + "\n" + options))
	return filepath.Join(c.opts.Cache, hex.EncodeToString(h[:])+".json")
}

// recall returns the record of a layer, or nil. One that cannot be read or is about something
// else does not exist.
func (c *conversion) recall(source v1.Hash, options string) *record {
	if c.opts.Cache == "" {
		return nil
	}
	raw, err := os.ReadFile(c.recordName(source, options))
	if err != nil {
		return nil
	}
	r := new(record)
	if json.Unmarshal(raw, r) != nil || r.Source != source || r.Options != options || !r.valid() {
		return nil
	}
	return r
}

func (r *record) valid() bool {
	_, err := toc.Promised(r.Target.Annotations)
	return err == nil && isTar(r.Target.MediaType) && r.Target.Size > 0 && isSHA256(r.Target.Digest) && isSHA256(r.DiffID)
}

func isSHA256(h v1.Hash) bool {
	b, err := hex.DecodeString(h.Hex)
	return h.Algorithm == "sha256" && err == nil && len(b) == sha256.Size
}

// remember writes the record of a layer that is in DST now. That it cannot be written costs a conversion
// later, and is no error.
func (c *conversion) remember(t *layerTask, options string) {
	if c.opts.Cache == "" {
		return
	}
	r := &record{t.desc.Digest, options, t.to, t.diffID, []string{c.dst.place()}}
	if old := c.recall(t.desc.Digest, options); old != nil && old.Target.Digest == r.Target.Digest {
		for _, p := range old.Places {
			if len(r.Places) < maxPlaces && !slices.Contains(r.Places, p) {
				r.Places = append(r.Places, p)
			}
		}
		if slices.Equal(r.Places, old.Places) {
			return
		}
	}
	raw, err := json.Marshal(r)
	if err != nil {
		return
	}
	if os.MkdirAll(c.opts.Cache, 0o755) != nil {
		return
	}
	atomically(c.recordName(t.desc.Digest, options), func(w io.Writer) error {
		_, err := w.Write(raw)
		return err
	})
}

// optionsString is what two conversions of a layer must have in common to give the same blob.
func (c *conversion) optionsString() string {
	if len(c.opts.Profile) == 0 {
		return c.shape.String()
	}
	h := sha256.New()
	for _, p := range c.opts.Profile {
		fmt.Fprintf(h, "%q\n", p)
	}
	return fmt.Sprintf("%s profile=%x", c.shape, h.Sum(nil)[:8])
}

// reuse looks for what a layer was converted to before. Then DST has it when reuse returns.
func (c *conversion) reuse(ctx context.Context, t *layerTask, options string) (bool, error) {
	use := func(to v1.Descriptor, diffID v1.Hash) (bool, error) {
		t.outcome, t.to, t.diffID = Reused, to, diffID
		c.remember(t, options)
		return true, nil
	}
	if r := c.recall(t.desc.Digest, options); r != nil {
		if ok, err := c.dst.has(ctx, r.Target, ""); err != nil {
			return false, err
		} else if ok {
			return use(r.Target, r.DiffID)
		}
		for _, p := range r.Places {
			if ok, err := c.dst.has(ctx, r.Target, p); err != nil {
				return false, err
			} else if ok {
				return use(r.Target, r.DiffID)
			}
		}
	}
	for _, k := range c.ask(ctx) {
		if k.layer.Annotations[sourceAnnotation] != t.desc.Digest.String() || k.layer.Annotations[optionsAnnotation] != options {
			continue
		}
		diffID, err := k.diffID(ctx)
		if err != nil {
			continue
		}
		r := record{Target: v1.Descriptor{MediaType: k.layer.MediaType, Digest: k.layer.Digest, Size: k.layer.Size,
			Annotations: c.ours(k.layer.Annotations)}, DiffID: diffID}
		if !r.valid() {
			continue
		}
		ok, err := c.dst.has(ctx, r.Target, "")
		if err == nil && !ok && k.src != nil {
			// It is in an archive that is to be replaced.
			err = c.copyBlob(ctx, k.src, r.Target, func(int) {})
			ok = err == nil
		}
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		if ok {
			return use(r.Target, r.DiffID)
		}
	}
	return false, nil
}

// ours returns the annotations that a conversion sets, out of those that a layer has.
func (c *conversion) ours(notes map[string]string) map[string]string {
	keys := []string{toc.DigestAnnotation, toc.UncompressedSizeAnnotation, sourceAnnotation, optionsAnnotation,
		toc.PositionAnnotation, toc.ZstdChecksumAnnotation, toc.ZstdPositionAnnotation}
	m := map[string]string{}
	for _, k := range keys {
		if v, ok := notes[k]; ok {
			m[k] = v
		}
	}
	return m
}

// A known layer is one that an image in DST says was converted before.
type known struct {
	layer v1.Descriptor
	index int // in the image
	src   remote.Source
	image *remote.Image
}

// diffID returns what the image's config says, which nobody checked: it is the word of whoever wrote to DST.
func (k *known) diffID(ctx context.Context) (v1.Hash, error) {
	config, _, err := k.image.Config(ctx)
	if err != nil {
		return v1.Hash{}, err
	}
	if k.index >= len(config.RootFS.DiffIDs) {
		return v1.Hash{}, fmt.Errorf("config has %d diffIDs", len(config.RootFS.DiffIDs))
	}
	return config.RootFS.DiffIDs[k.index], nil
}

// maxAsked is how many manifests of DST are read to learn what was converted before.
const maxAsked = 32

// ask returns the layers of the images that DST has and that may have been converted before.
// It looks once, when the first layer is not in the cache, and finds nothing where there is an error.
func (c *conversion) ask(ctx context.Context) []known {
	c.once.Do(func() {
		asked := 0
		for _, s := range c.dst.others(ctx) {
			ref, err := remote.ParseReference(s)
			if err != nil {
				continue
			}
			src, err := remote.Open(ctx, ref, c.opts.Remote)
			if err != nil {
				continue
			}
			c.knownSrcs = append(c.knownSrcs, src)
			desc, raw, err := src.Root(ctx)
			if err != nil {
				continue
			}
			var walk func(desc v1.Descriptor, raw []byte, depth int)
			walk = func(desc v1.Descriptor, raw []byte, depth int) {
				if asked++; asked > maxAsked || depth > maxDepth || ctx.Err() != nil {
					return
				}
				if !desc.MediaType.IsIndex() {
					img, err := remote.ReadImage(ctx, src, desc)
					if err != nil {
						return
					}
					for i, l := range img.Layers {
						if l.Annotations[sourceAnnotation] != "" {
							c.known = append(c.known, known{l.Descriptor, i, src, img})
						}
					}
					return
				}
				var index v1.IndexManifest
				if json.Unmarshal(raw, &index) != nil {
					return
				}
				for _, d := range index.Manifests {
					if d.Annotations[attestationType] != "" {
						continue
					}
					if raw, err := src.Manifest(ctx, d); err == nil {
						walk(d, raw, depth+1)
					}
				}
			}
			walk(desc, raw, 0)
		}
	})
	return c.known
}

func (c *conversion) closeKnown() {
	for _, s := range c.knownSrcs {
		s.Close()
	}
}

// maxTOC is how large a compressed table of contents may be that is read to learn its digest, in bytes.
const maxTOC = 256 << 20

// promise returns the annotations that make a layer lazy that has a table of contents at
// loc, but a manifest that does not say so. It is an error if it cannot be read piece by piece.
func (c *conversion) promise(ctx context.Context, d v1.Descriptor, loc toc.Location) (map[string]string, error) {
	if loc.Size > maxTOC {
		return nil, fmt.Errorf("table of contents of %d bytes", loc.Size)
	}
	packed, err := c.readRange(ctx, d, loc.Offset, loc.Size)
	if err != nil {
		return nil, err
	}
	var r io.Reader
	if loc.Compression == toc.Zstd {
		z, err := zstd.NewReader(bytes.NewReader(packed), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		defer z.Close()
		r = z
	} else {
		z, err := gzip.NewReader(bytes.NewReader(packed))
		if err != nil {
			return nil, err
		}
		t := tar.NewReader(z)
		if _, err := t.Next(); err != nil {
			return nil, err
		}
		r = t
	}
	h := sha256.New()
	n, err := io.Copy(h, io.LimitReader(r, toc.MaxInflated+1))
	if err != nil {
		return nil, err
	}
	want := toc.Promise{}
	h.Sum(want.Digest[:0])
	if _, err := toc.Parse(bytes.NewReader(packed), loc, want); err != nil {
		return nil, err
	}
	notes := map[string]string{toc.DigestAnnotation: want.Digest.String()}
	if loc.Compression == toc.Zstd {
		notes[toc.ZstdPositionAnnotation] = fmt.Sprintf("%d:%d:%d:1", loc.Offset, loc.Size, n)
	} else {
		notes[toc.PositionAnnotation] = fmt.Sprintf("%d:%d:%d", loc.Offset, loc.Size, n)
	}
	return notes, nil
}
