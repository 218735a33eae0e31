package remote

import (
	"archive/tar"
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Bounds of an archive. An image of 127 layers, docker's limit, has some 400 members.
const (
	maxMembers     = 1 << 16
	maxMemberName  = 1024
	maxArchiveLink = 8 // hops
	maxLayers      = 4096
)

// archive is a tar file as files: its members are read where they lie in it.
type archive struct {
	f       *os.File
	members map[string]member
}

type member struct {
	off, size int64  // in bytes of the archive
	link      string // name of the member it is another name of, or ""
}

func (a *archive) Close() error { return a.f.Close() }

func (a *archive) open(name string) (file, error) {
	m, err := a.find(name)
	if err != nil {
		return file{}, err
	}
	return file{io.NewSectionReader(a.f, m.off, m.size), m.size, func() error { return nil }}, nil
}

func (a *archive) find(name string) (member, error) {
	name = path.Clean(name)
	for hop := 0; hop <= maxArchiveLink; hop++ {
		m, ok := a.members[name]
		if !ok {
			return m, fmt.Errorf("%.200q: %w", name, fs.ErrNotExist)
		}
		if m.link == "" {
			return m, nil
		}
		name = m.link
	}
	return member{}, fmt.Errorf("%.200q: too many links", name)
}

// readArchive reads the headers of all members.
func readArchive(ctx context.Context, f *os.File) (*archive, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	var magic [2]byte
	if _, err := f.ReadAt(magic[:], 0); err == nil && magic == [2]byte{0x1f, 0x8b} {
		return nil, errors.New("compressed as a whole, so its parts cannot be read by themselves: gunzip it first")
	}
	a := &archive{f: f, members: make(map[string]member)}
	// The reader seeks over content, and reads nothing ahead: after Next, the
	// file's position is where the member's content begins.
	for tr, n := tar.NewReader(f), 0; ; n++ {
		h, err := tr.Next()
		if err == io.EOF {
			return a, nil
		}
		if err != nil {
			return nil, fmt.Errorf("not a complete tar file: %w", err)
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if n == maxMembers || len(h.Name) > maxMemberName || len(h.Linkname) > maxMemberName {
			return nil, errors.New("not an archive of docker save: too many members, or too long names")
		}
		m := member{size: h.Size}
		name := path.Clean(h.Name)
		switch h.Typeflag {
		case tar.TypeReg:
			if sparse(h) {
				return nil, fmt.Errorf("member %.200q: sparse: write the archive without", h.Name)
			}
			if m.off, err = f.Seek(0, io.SeekCurrent); err != nil {
				return nil, err
			}
			if m.size > st.Size()-m.off {
				return nil, fmt.Errorf("member %.200q: the file ends within it: it is truncated", h.Name)
			}
		case tar.TypeLink:
			m.link = path.Clean(h.Linkname)
		case tar.TypeSymlink:
			// Docker once wrote a layer that two images share as a link.
			m.link = path.Join(path.Dir(name), h.Linkname)
		default:
			continue
		}
		if _, ok := a.members[name]; ok {
			return nil, fmt.Errorf("member %.200q: twice in the archive", h.Name)
		}
		a.members[name] = m
	}
}

// sparse reports whether the content of a member is not stored as it is.
func sparse(h *tar.Header) bool {
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

func openArchive(ctx context.Context, ref Reference) (Source, error) {
	st, err := os.Stat(ref.path)
	if err == nil && !st.Mode().IsRegular() { // opening a fifo would wait for a writer
		err = errors.New("not a regular file")
	}
	if err != nil {
		return nil, wrap(ref, err)
	}
	f, err := os.Open(ref.path)
	if err != nil {
		return nil, wrap(ref, err)
	}
	src, err := newArchive(ctx, ref, f)
	if err != nil {
		f.Close()
		return nil, wrap(ref, err)
	}
	return src, nil
}

func newArchive(ctx context.Context, ref Reference, f *os.File) (*local, error) {
	a, err := readArchive(ctx, f)
	if err != nil {
		return nil, err
	}
	// Docker 25 and later write an OCI layout, and the old files beside it. The layout
	// has the digests and says more, such as all platforms.
	if _, err := a.find("index.json"); err == nil {
		return newLayout(ctx, ref, a)
	}
	return newOldArchive(ctx, ref, a)
}

// newOldArchive returns the source of an image in an archive without digests: it makes the manifest that
// docker push would make of it, with the layers as they lie in the archive.
func newOldArchive(ctx context.Context, ref Reference, a *archive) (*local, error) {
	raw, err := readSmall(a, "manifest.json", maxManifest)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("not an archive of docker save: neither manifest.json nor index.json is in it: %w", ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	var list []savedImage
	if err := json.Unmarshal(raw, &list); err != nil {
		return nil, fmt.Errorf("manifest.json: %w", err)
	}
	saved, err := chooseSaved(list, ref)
	if err != nil {
		return nil, err
	}
	if len(saved.Layers) > maxLayers {
		return nil, fmt.Errorf("manifest.json: %d layers", len(saved.Layers))
	}
	config, err := readSmall(a, saved.Config, maxConfig)
	if err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	names := make(map[v1.Hash]string)
	m := v1.Manifest{
		SchemaVersion: 2,
		MediaType:     types.DockerManifestSchema2,
		Config:        v1.Descriptor{MediaType: types.DockerConfigJSON, Size: int64(len(config)), Digest: sum(config)},
		Layers:        []v1.Descriptor{},
	}
	names[m.Config.Digest] = saved.Config
	// A member is hashed once, however often a hostile manifest.json names it.
	seen := make(map[member]v1.Descriptor)
	for i, name := range saved.Layers {
		at, err := a.find(name)
		if err != nil {
			return nil, fmt.Errorf("layer %d: %w", i+1, err)
		}
		d, ok := seen[at]
		if !ok {
			if d, err = describe(ctx, io.NewSectionReader(a.f, at.off, at.size)); err != nil {
				return nil, fmt.Errorf("layer %d: %.200q: %w", i+1, name, err)
			}
			seen[at] = d
		}
		if d.MediaType == types.OCILayerZStd {
			m.MediaType = types.OCIManifestSchema1 // docker's own types have no zstd
		}
		names[d.Digest] = name
		m.Layers = append(m.Layers, d)
	}
	if m.MediaType == types.OCIManifestSchema1 {
		m.Config.MediaType = types.OCIConfigJSON
		for i := range m.Layers {
			m.Layers[i].MediaType = inOCI[m.Layers[i].MediaType]
		}
	}
	if raw, err = json.Marshal(m); err != nil {
		return nil, err
	}
	if h := ref.digest; h != (v1.Hash{}) && h != sum(raw) {
		return nil, fmt.Errorf("%w: an archive in docker's old form has no digests of its own; its image has %v here", ErrNotFound, sum(raw))
	}
	return &local{
		ref:   ref,
		files: a,
		root:  root{v1.Descriptor{MediaType: m.MediaType, Size: int64(len(raw)), Digest: sum(raw)}, raw},
		name:  func(h v1.Hash) string { return names[h] },
	}, nil
}

var inOCI = map[types.MediaType]types.MediaType{
	types.DockerUncompressedLayer: types.OCIUncompressedLayer,
	types.DockerLayer:             types.OCILayer,
	types.OCILayerZStd:            types.OCILayerZStd,
}

// describe reads a layer and returns its descriptor, the type by its first bytes.
func describe(ctx context.Context, r *io.SectionReader) (v1.Descriptor, error) {
	d := v1.Descriptor{MediaType: types.DockerUncompressedLayer, Size: r.Size()}
	hash := sha256.New()
	buf := make([]byte, 256<<10)
	for off := int64(0); off < r.Size(); {
		n, err := r.ReadAt(buf[:min(int64(len(buf)), r.Size()-off)], off)
		if n == 0 {
			return d, err
		}
		if off == 0 && bytes.HasPrefix(buf[:n], []byte{0x1f, 0x8b}) {
			d.MediaType = types.DockerLayer
		} else if off == 0 && bytes.HasPrefix(buf[:n], []byte{0x28, 0xb5, 0x2f, 0xfd}) {
			d.MediaType = types.OCILayerZStd
		}
		hash.Write(buf[:n])
		off += int64(n)
		if err := ctx.Err(); err != nil {
			return d, err
		}
	}
	d.Digest = v1.Hash{Algorithm: "sha256", Hex: hex.EncodeToString(hash.Sum(nil))}
	return d, nil
}

// savedImage is an entry of manifest.json.
type savedImage struct {
	Config   string
	RepoTags []string
	Layers   []string
}

// chooseSaved returns the image in manifest.json that ref names.
func chooseSaved(list []savedImage, ref Reference) (savedImage, error) {
	var found []savedImage
	var names []string
	for _, s := range list {
		fits := ref.tag == "" && len(list) == 1
		for _, t := range s.RepoTags {
			if len(names) < maxListed {
				names = append(names, clean(t))
			}
			fits = fits || sameTag(t, cmp.Or(ref.tag, "latest"))
		}
		if fits {
			found = append(found, s)
		}
	}
	listed := "there is " + strings.Join(names, ", ")
	if len(names) == 0 {
		listed = "none of them has a name"
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) > 1:
		return savedImage{}, fmt.Errorf("%d images in it fit: choose one by its whole name: %s", len(found), listed)
	}
	return savedImage{}, fmt.Errorf("%w: no image with the tag %q among the %d in it: %s", ErrNotFound, cmp.Or(ref.tag, "latest"), len(list), listed)
}
