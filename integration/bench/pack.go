package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"lazuli/fs/pack"
	"lazuli/fs/toc"
)

// A startupPack is what an image has in the registry.
type startupPack struct {
	path    string // of the blob, in the registry
	blob    []byte
	index   *pack.Index
	needed  int64
	chunks  int
	content int64              // bytes of all files of the image, each content once
	places  map[string][]int64 // where the members of the layers' chunks begin in the blobs, sorted, by the blob's digest; as many times as there are chunks in them
}

// A packUse says what a run fetched, held against the pack.
type packUse struct {
	// Needed is what the job needs, compressed: the bytes of a startup pack that is made of a second recording of it, which is not pushed.
	Needed int64 `json:"needed"`
	Chunks int   `json:"chunks"` // in the pack
	// Beside is how many chunks were in what was fetched of layers in other requests: those that a read missed, and their neighbours.
	Beside int `json:"beside"`
}

// profile records the job of an image in the registry, and pushes a pack of it.
func (w *world) profile(ctx context.Context, im image, to name.Reference, pushed v1.Image, dir string) error {
	say("profiling %s", im.Name)
	// A configuration of its own, as this machine may have a daemon.
	config, again := filepath.Join(w.Work, "profile.toml"), filepath.Join(w.Work, "again")
	if err := os.WriteFile(config, fmt.Appendf(nil, "socket = %q\n", filepath.Join(w.Work, "none.sock")), 0o644); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"--push", to.String()},
		{"-o", again + ".profile", to.String()},
		{"pack", "--profile", again + ".profile", "-o", again + ".pack", to.String()},
	} {
		if err := run(ctx, w.Lazuli, append([]string{"--root", filepath.Join(w.Work, "profile"), "--config", config, "profile"}, args...)...); err != nil {
			return err
		}
	}
	second, err := os.Stat(again + ".pack")
	if err != nil {
		return err
	}
	blob, err := w.packOf(ctx, to.Context(), pushed)
	if err != nil {
		return err
	}
	p := &startupPack{path: "/v2/" + to.Context().RepositoryStr() + "/blobs/" + blob.Digest.String(), needed: second.Size()}
	layer, err := remote.Layer(to.Context().Digest(blob.Digest.String()), w.past(ctx)...)
	if err != nil {
		return err
	}
	r, err := layer.Compressed()
	if err != nil {
		return err
	}
	p.blob, err = io.ReadAll(r)
	if err := errors.Join(err, r.Close()); err != nil {
		return err
	}
	if p.index, err = pack.ReadIndex(bytes.NewReader(p.blob)); err != nil {
		return err
	}
	for _, f := range p.index.Frames {
		p.chunks += len(f.Chunks)
	}
	w.packs[im.Name] = p
	all, err := w.pieces(ctx, im)
	if err != nil {
		return err
	}
	for _, x := range all {
		p.content += int64(x.Size)
	}
	p.places, err = places(pushed, dir)
	return err
}

// packOf returns the blob of the startup pack: the largest of what refers to the image.
func (w *world) packOf(ctx context.Context, repo name.Repository, img v1.Image) (largest v1.Descriptor, err error) {
	digest, err := img.Digest()
	if err != nil {
		return largest, err
	}
	referrers, err := remote.Referrers(repo.Digest(digest.String()), w.past(ctx)...)
	if err != nil {
		return largest, err
	}
	list, err := referrers.IndexManifest()
	if err != nil {
		return largest, err
	}
	for _, d := range list.Manifests {
		artifact, err := remote.Image(repo.Digest(d.Digest.String()), w.past(ctx)...)
		if err != nil {
			return largest, err
		}
		m, err := artifact.Manifest()
		if err != nil {
			return largest, err
		}
		for _, l := range m.Layers {
			if l.Size > largest.Size {
				largest = l
			}
		}
	}
	if largest.Size == 0 {
		err = fmt.Errorf("nothing in the registry refers to %s", digest)
	}
	return largest, err
}

// places reads the tables of contents of an image in a layout.
func places(img v1.Image, dir string) (map[string][]int64, error) {
	m, err := img.Manifest()
	if err != nil {
		return nil, err
	}
	all := map[string][]int64{}
	for _, l := range m.Layers {
		t, err := readTOC(l, dir)
		if err != nil {
			return nil, err
		}
		var list []int64
		for _, c := range t.Chunks {
			if !c.Hole {
				list = append(list, c.Member)
			}
		}
		slices.Sort(list)
		all[l.Digest.String()] = list
	}
	return all, nil
}

// readTOC reads the table of contents of a layer of an image in a layout.
func readTOC(l v1.Descriptor, dir string) (t *toc.TOC, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("layer %s: %w", l.Digest, err)
		}
	}()
	f, err := os.Open(filepath.Join(dir, "blobs", l.Digest.Algorithm, l.Digest.Hex))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	at, ok, err := toc.Locate(l.Annotations, l.Size)
	if err == nil && !ok {
		tail := make([]byte, min(l.Size, toc.FooterSize))
		if _, err = f.ReadAt(tail, l.Size-int64(len(tail))); err == nil {
			at, err = toc.ParseFooter(tail, l.Size)
		}
	}
	if err != nil {
		return nil, err
	}
	promise, err := toc.Promised(l.Annotations)
	if err != nil {
		return nil, err
	}
	return toc.Parse(io.NewSectionReader(f, at.Offset, at.Size), at, promise)
}

// use says what came beside the pack.
func (p *startupPack) use(requests []request) *packUse {
	u := &packUse{Needed: p.needed, Chunks: p.chunks}
	for _, q := range requests {
		var from, to int64
		if n, _ := fmt.Sscanf(q.Range, "bytes=%d-%d", &from, &to); n < 2 {
			continue
		}
		members := p.places[path.Base(q.Path)]
		first, _ := slices.BinarySearch(members, from)
		end, _ := slices.BinarySearch(members, to+1)
		u.Beside += end - first
	}
	return u
}
